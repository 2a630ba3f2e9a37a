SELECT pgqueue.jobs.priority
FROM pgqueue.jobs
WHERE pgqueue.jobs.queue = %(of_queue)s::VARCHAR
AND pgqueue.jobs.status = 'pending'
AND pgqueue.jobs.waits_for IS NULL
ORDER BY pgqueue.jobs.priority DESC
LIMIT 1;
