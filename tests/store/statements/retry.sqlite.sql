UPDATE pgqueue_jobs
SET status=CASE WHEN (pgqueue_jobs.cancel_requested_at IS NOT NULL) THEN 'cancelled' ELSE r.status END, run_at=CASE
    WHEN (r.delay IS NOT NULL
    AND pgqueue_jobs.cancel_requested_at IS NULL) THEN strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds',
        r.delay)) ELSE pgqueue_jobs.run_at END, claim_token=NULL, claim_expires_at=NULL, retries=(pgqueue_jobs.retries
        + CASE WHEN (pgqueue_jobs.cancel_requested_at IS NOT NULL) THEN 0 ELSE r.charge END), error=coalesce(r.error,
        pgqueue_jobs.error), finished_at=CASE WHEN (pgqueue_jobs.cancel_requested_at IS NOT NULL OR r.status !=
        'pending') THEN strftime('%Y-%m-%d %H:%M:%f', 'now') END, cancel_requested_at=NULL, prune_at=CASE WHEN
        (r.status = 'dead'
    AND pgqueue_jobs.cancel_requested_at IS NULL) THEN (
    SELECT strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', pgqueue_limits.keep_dead)) AS anon_1
    FROM pgqueue_limits
    WHERE pgqueue_limits.scope = 'task'
    AND pgqueue_limits.name = pgqueue_jobs.task
    AND pgqueue_limits.keep_dead IS NOT NULL) END
FROM (
    SELECT json_extract(e.value, ?) AS id, json_extract(e.value, ?) AS token, json_extract(e.value, ?) AS status,
        json_extract(e.value, ?) AS delay, json_extract(e.value, ?) AS charge, json_extract(e.value, ?) AS error
    FROM json_each(?) AS e) AS r
WHERE pgqueue_jobs.id = r.id
AND pgqueue_jobs.claim_token = r.token
RETURNING id, queue, task, status, claimed_by, claimed_at;
