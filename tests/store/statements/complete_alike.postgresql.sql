UPDATE pgqueue.jobs
SET status='completed', claim_token=NULL, claim_expires_at=NULL, finished_at=statement_timestamp()
WHERE pgqueue.jobs.id = ANY (CAST(%(ids)s::VARCHAR AS bigint[]))
AND pgqueue.jobs.claim_token = %(token)s::UUID
RETURNING pgqueue.jobs.id;
