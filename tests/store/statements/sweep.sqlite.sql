UPDATE pgqueue_jobs
SET status=CASE WHEN (pgqueue_jobs.cancel_requested_at IS NOT NULL) THEN 'cancelled' WHEN (pgqueue_jobs.retries >=
    pgqueue_jobs.max_retries) THEN 'dead' ELSE 'pending' END, claim_token=NULL, claim_expires_at=NULL,
    retries=(pgqueue_jobs.retries + CASE WHEN (pgqueue_jobs.cancel_requested_at IS NOT NULL OR pgqueue_jobs.retries >=
    pgqueue_jobs.max_retries) THEN 0 ELSE 1 END), error=?, finished_at=CASE WHEN (pgqueue_jobs.cancel_requested_at IS
    NOT NULL OR pgqueue_jobs.retries >= pgqueue_jobs.max_retries) THEN strftime('%Y-%m-%d %H:%M:%f', 'now') END,
    cancel_requested_at=NULL, prune_at=CASE WHEN (pgqueue_jobs.retries >= pgqueue_jobs.max_retries
    AND pgqueue_jobs.cancel_requested_at IS NULL) THEN (
    SELECT strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', pgqueue_limits.keep_dead)) AS anon_1
    FROM pgqueue_limits
    WHERE pgqueue_limits.scope = 'task'
    AND pgqueue_limits.name = pgqueue_jobs.task
    AND pgqueue_limits.keep_dead IS NOT NULL) END
WHERE pgqueue_jobs.id IN (
    SELECT pgqueue_jobs.id
    FROM pgqueue_jobs
    WHERE pgqueue_jobs.status = 'running'
    AND pgqueue_jobs.claim_expires_at < strftime('%Y-%m-%d %H:%M:%f', 'now')
    AND pgqueue_jobs.claim_expires_at >= substr(?, 1, 19)
    ORDER BY pgqueue_jobs.claim_expires_at
    LIMIT ? OFFSET ?)
RETURNING id, queue, task, attempt, status, claimed_by, claimed_at;
