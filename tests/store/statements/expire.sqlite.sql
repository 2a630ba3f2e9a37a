UPDATE pgqueue_jobs
SET status='dead', error=?, finished_at=strftime('%Y-%m-%d %H:%M:%f', 'now'), waits_for=NULL
WHERE pgqueue_jobs.id IN (
    SELECT pgqueue_jobs.id
    FROM pgqueue_jobs
    WHERE pgqueue_jobs.status = 'pending'
    AND pgqueue_jobs.expires_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')
    ORDER BY pgqueue_jobs.expires_at
    LIMIT ? OFFSET ?)
RETURNING id, queue, task, attempt;
