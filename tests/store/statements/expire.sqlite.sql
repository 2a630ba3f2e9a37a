UPDATE pgqueue_jobs
SET status='dead', error=?, finished_at=strftime('%Y-%m-%d %H:%M:%f', 'now'), waits_for=NULL, prune_at=(
    SELECT strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', pgqueue_limits.keep_dead)) AS anon_1
    FROM pgqueue_limits
    WHERE pgqueue_limits.scope = 'task'
    AND pgqueue_limits.name = pgqueue_jobs.task
    AND pgqueue_limits.keep_dead IS NOT NULL)
WHERE pgqueue_jobs.id IN (
    SELECT pgqueue_jobs.id
    FROM pgqueue_jobs
    WHERE pgqueue_jobs.status = 'pending'
    AND pgqueue_jobs.expires_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')
    AND pgqueue_jobs.expires_at >= substr(?, 1, 19)
    ORDER BY pgqueue_jobs.expires_at
    LIMIT ? OFFSET ?)
RETURNING id, queue, task, attempt;
