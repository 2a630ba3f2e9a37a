DELETE
FROM pgqueue.jobs
WHERE pgqueue.jobs.id = ANY (CAST(%(ids)s::VARCHAR AS bigint[]))
AND pgqueue.jobs.claim_token = %(token)s::UUID
AND pgqueue.jobs.slot IS NULL
AND NOT pgqueue.jobs.leads_order
RETURNING pgqueue.jobs.id, pgqueue.jobs.unique_key IS NOT NULL AS anon_1;

UPDATE pgqueue.jobs
SET status='completed', claim_token=NULL, claim_expires_at=NULL, result=CAST(r.result AS jsonb), finished_at=now(),
    prune_at=now() + make_interval(secs => CAST(r.keep AS double precision))
FROM json_to_recordset(CAST(%(finished)s::VARCHAR AS JSON)) AS r(id BIGINT, token UUID, keep DOUBLE PRECISION, result
    TEXT)
WHERE pgqueue.jobs.id = r.id
AND pgqueue.jobs.claim_token = r.token
RETURNING pgqueue.jobs.id;
