SELECT pgqueue_jobs.priority
FROM pgqueue_jobs
WHERE pgqueue_jobs.queue = ?
AND pgqueue_jobs.status = 'pending'
AND pgqueue_jobs.waits_for IS NULL
ORDER BY pgqueue_jobs.priority DESC
LIMIT 1 OFFSET ?;
