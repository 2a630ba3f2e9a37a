UPDATE pgqueue.jobs
SET status=r.status, run_at=CASE WHEN (r.delay IS NOT NULL) THEN now() + make_interval(secs => CAST(r.delay AS double
    precision)) ELSE pgqueue.jobs.run_at END, claim_token=NULL, claim_expires_at=NULL, retries=(pgqueue.jobs.retries +
    r.charge), error=coalesce(CAST(r.error AS jsonb), pgqueue.jobs.error), finished_at=CASE WHEN (r.status !=
    'pending') THEN now() END
FROM json_to_recordset(CAST(%(finished)s::VARCHAR AS JSON)) AS r(id BIGINT, token UUID, status TEXT, delay DOUBLE
    PRECISION, charge INTEGER, error TEXT)
WHERE pgqueue.jobs.id = r.id
AND pgqueue.jobs.claim_token = r.token
RETURNING pgqueue.jobs.id, pgqueue.jobs.queue, pgqueue.jobs.task, pgqueue.jobs.claimed_by, pgqueue.jobs.claimed_at;
