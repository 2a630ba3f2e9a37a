UPDATE pgqueue.jobs
SET status=CASE WHEN (pgqueue.jobs.cancel_requested_at IS NOT NULL) THEN 'cancelled' ELSE r.status END, run_at=CASE
    WHEN (r.delay IS NOT NULL
    AND pgqueue.jobs.cancel_requested_at IS NULL) THEN now() + make_interval(secs => CAST(r.delay AS double
        precision)) ELSE pgqueue.jobs.run_at END, claim_token=NULL, claim_expires_at=NULL,
        retries=(pgqueue.jobs.retries + CASE WHEN (pgqueue.jobs.cancel_requested_at IS NOT NULL) THEN 0 ELSE r.charge
        END), error=coalesce(CAST(r.error AS jsonb), pgqueue.jobs.error), finished_at=CASE WHEN
        (pgqueue.jobs.cancel_requested_at IS NOT NULL OR r.status != 'pending') THEN now() END,
        cancel_requested_at=NULL, prune_at=CASE WHEN (r.status = 'dead'
    AND pgqueue.jobs.cancel_requested_at IS NULL) THEN (
    SELECT now() + make_interval(secs => CAST(pgqueue.limits.keep_dead AS double precision)) AS anon_1
    FROM pgqueue.limits
    WHERE pgqueue.limits.scope = 'task'
    AND pgqueue.limits.name = pgqueue.jobs.task
    AND pgqueue.limits.keep_dead IS NOT NULL) END
FROM json_to_recordset(CAST(%(finished)s::VARCHAR AS JSON)) AS r(id BIGINT, token UUID, status TEXT, delay DOUBLE
    PRECISION, charge INTEGER, error TEXT)
WHERE pgqueue.jobs.id = r.id
AND pgqueue.jobs.claim_token = r.token
RETURNING pgqueue.jobs.id, pgqueue.jobs.queue, pgqueue.jobs.task, pgqueue.jobs.status, pgqueue.jobs.claimed_by,
    pgqueue.jobs.claimed_at;
