UPDATE pgqueue.jobs
SET claim_expires_at=now() + make_interval(secs => CAST(%(lease)s AS double precision))
WHERE pgqueue.jobs.id = ANY (ARRAY(
        SELECT pgqueue.jobs.id
        FROM pgqueue.jobs
        JOIN json_to_recordset(CAST(%(claims)s::VARCHAR AS JSON)) AS r(id BIGINT, token UUID) ON pgqueue.jobs.id =
            r.id
        AND pgqueue.jobs.claim_token = r.token
        FOR UPDATE OF jobs SKIP LOCKED));

SELECT pgqueue.jobs.id, pgqueue.jobs.cancel_requested_at IS NOT NULL AS asked
FROM pgqueue.jobs
JOIN json_to_recordset(CAST(%(claims)s::VARCHAR AS JSON)) AS r(id BIGINT, token UUID) ON pgqueue.jobs.id = r.id
AND pgqueue.jobs.claim_token = r.token;
