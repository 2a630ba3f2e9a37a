UPDATE pgqueue.jobs
SET status='completed', claim_token=NULL, claim_expires_at=NULL, result=CAST(r.result AS jsonb),
    finished_at=statement_timestamp(), prune_at=now() + make_interval(secs => CAST(r.keep AS double precision))
FROM json_to_recordset(CAST(%(finished)s::VARCHAR AS JSON)) AS r(id BIGINT, token UUID, keep DOUBLE PRECISION, result
    TEXT)
WHERE pgqueue.jobs.id = r.id
AND pgqueue.jobs.claim_token = r.token
RETURNING pgqueue.jobs.id;
