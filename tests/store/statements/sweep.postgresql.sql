UPDATE pgqueue.jobs
SET status=CASE WHEN (pgqueue.jobs.cancel_requested_at IS NOT NULL) THEN 'cancelled' WHEN (pgqueue.jobs.retries >=
    pgqueue.jobs.max_retries) THEN 'dead' ELSE 'pending' END, claim_token=NULL, claim_expires_at=NULL,
    retries=(pgqueue.jobs.retries + CASE WHEN (pgqueue.jobs.cancel_requested_at IS NOT NULL OR pgqueue.jobs.retries >=
    pgqueue.jobs.max_retries) THEN 0 ELSE 1 END), error=CAST(%(param_1)s::VARCHAR AS jsonb), finished_at=CASE WHEN
    (pgqueue.jobs.cancel_requested_at IS NOT NULL OR pgqueue.jobs.retries >= pgqueue.jobs.max_retries) THEN now() END,
    cancel_requested_at=NULL, prune_at=CASE WHEN (pgqueue.jobs.retries >= pgqueue.jobs.max_retries
    AND pgqueue.jobs.cancel_requested_at IS NULL) THEN (
    SELECT now() + make_interval(secs => CAST(pgqueue.limits.keep_dead AS double precision)) AS anon_1
    FROM pgqueue.limits
    WHERE pgqueue.limits.scope = 'task'
    AND pgqueue.limits.name = pgqueue.jobs.task
    AND pgqueue.limits.keep_dead IS NOT NULL) END
WHERE pgqueue.jobs.id = ANY (ARRAY(
        SELECT pgqueue.jobs.id
        FROM pgqueue.jobs
        WHERE pgqueue.jobs.status = 'running'
        AND pgqueue.jobs.claim_expires_at < now()
        AND pgqueue.jobs.claim_expires_at >= %(since)s::TIMESTAMP WITH TIME ZONE
        ORDER BY pgqueue.jobs.claim_expires_at
        LIMIT %(limit)s::INTEGER
        FOR UPDATE SKIP LOCKED))
RETURNING pgqueue.jobs.id, pgqueue.jobs.queue, pgqueue.jobs.task, pgqueue.jobs.attempt, pgqueue.jobs.status,
    pgqueue.jobs.claimed_by, pgqueue.jobs.claimed_at;
