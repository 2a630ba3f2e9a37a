UPDATE pgqueue.jobs
SET status='completed', claim_token=NULL, claim_expires_at=NULL, result=CAST(%(document)s::VARCHAR AS jsonb),
    finished_at=statement_timestamp()
WHERE pgqueue.jobs.id = %(job_id)s::BIGINT
AND pgqueue.jobs.claim_token = %(token)s::UUID
AND (
    SELECT set_config('idle_in_transaction_session_timeout', %(milliseconds)s::VARCHAR, true) AS set_config_1) IS NOT
        NULL
RETURNING pgqueue.jobs.id;
