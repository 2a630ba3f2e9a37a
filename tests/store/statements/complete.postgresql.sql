UPDATE pgqueue.jobs
SET status='completed', claim_token=NULL, claim_expires_at=NULL, result=CAST(r.result AS jsonb),
    finished_at=statement_timestamp()
FROM json_to_recordset(CAST(%(finished)s::VARCHAR AS JSON)) AS r(id BIGINT, token UUID, result TEXT)
WHERE pgqueue.jobs.id = r.id
AND pgqueue.jobs.claim_token = r.token
RETURNING pgqueue.jobs.id;
