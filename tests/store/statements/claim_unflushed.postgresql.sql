WITH RECURSIVE lane(priority) AS (
    SELECT (
        SELECT first.priority
        FROM pgqueue.jobs AS first
        WHERE first.queue = %(of_queue)s::VARCHAR
        AND first.status = 'pending'
        AND first.waits_for IS NULL
        ORDER BY first.priority DESC
        LIMIT %(param_1)s::INTEGER) AS priority
    UNION ALL
    SELECT (
        SELECT following.priority
        FROM pgqueue.jobs AS following
        WHERE following.queue = %(of_queue)s::VARCHAR
        AND following.status = 'pending'
        AND following.waits_for IS NULL
        AND following.priority < lane.priority
        ORDER BY following.priority DESC
        LIMIT %(param_2)s::INTEGER) AS anon_1
    FROM lane
    WHERE lane.priority IS NOT NULL)
SELECT lane.priority, (EXISTS (
        SELECT *
        FROM pgqueue.limits
        WHERE pgqueue.limits.scope = 'queue'
        AND pgqueue.limits.name = %(of_queue)s::VARCHAR
        AND (pgqueue.limits.concurrency IS NOT NULL OR pgqueue.limits.key_concurrency IS NOT NULL OR
            pgqueue.limits.rate IS NOT NULL OR pgqueue.limits.promote_after IS NOT NULL OR pgqueue.limits.ordered OR
            pgqueue.limits.releasing))) OR (EXISTS (
        SELECT *
        FROM pgqueue.limits
        WHERE pgqueue.limits.scope = 'task'
        AND (pgqueue.limits.concurrency IS NOT NULL OR pgqueue.limits.key_concurrency IS NOT NULL OR
            pgqueue.limits.rate IS NOT NULL OR pgqueue.limits.promote_after IS NOT NULL OR pgqueue.limits.ordered OR
            pgqueue.limits.releasing))) AS limited
FROM lane
WHERE lane.priority IS NOT NULL;

UPDATE pgqueue.jobs
SET status='running', claimed_by=%(worker)s::VARCHAR, claim_token=%(token)s::UUID, claim_expires_at=now() +
    make_interval(secs => CAST(%(lease)s AS double precision)), attempt=CASE WHEN (pgqueue.jobs.attempt < 2147483647)
    THEN pgqueue.jobs.attempt + 1 ELSE 2147483647 END, claimed_at=now()
WHERE pgqueue.jobs.id = ANY (ARRAY(
        SELECT due.id
        FROM json_to_recordset(CAST(%(lanes)s::VARCHAR AS JSON)) AS r(priority SMALLINT, run_at TIMESTAMP WITH TIME
            ZONE, id BIGINT)
        JOIN LATERAL (
            SELECT pgqueue.jobs.id AS id
            FROM pgqueue.jobs
            WHERE pgqueue.jobs.queue = %(of_queue)s::VARCHAR
            AND pgqueue.jobs.priority = r.priority
            AND pgqueue.jobs.status = 'pending'
            AND pgqueue.jobs.waits_for IS NULL
            AND pgqueue.jobs.run_at <= now()
            AND (pgqueue.jobs.run_at, pgqueue.jobs.id) > (r.run_at, r.id)
            AND NOT ((EXISTS (
                        SELECT *
                        FROM pgqueue.limits
                        WHERE pgqueue.limits.scope = 'queue'
                        AND pgqueue.limits.name = %(of_queue)s::VARCHAR
                        AND (pgqueue.limits.concurrency IS NOT NULL OR pgqueue.limits.key_concurrency IS NOT NULL OR
                            pgqueue.limits.rate IS NOT NULL OR pgqueue.limits.promote_after IS NOT NULL OR
                            pgqueue.limits.ordered OR pgqueue.limits.releasing))) OR (EXISTS (
                        SELECT *
                        FROM pgqueue.limits
                        WHERE pgqueue.limits.scope = 'task'
                        AND (pgqueue.limits.concurrency IS NOT NULL OR pgqueue.limits.key_concurrency IS NOT NULL OR
                            pgqueue.limits.rate IS NOT NULL OR pgqueue.limits.promote_after IS NOT NULL OR
                            pgqueue.limits.ordered OR pgqueue.limits.releasing))))
            AND NOT (EXISTS (
                    SELECT 1
                    FROM pgqueue.queues
                    WHERE pgqueue.queues.name = %(of_queue)s::VARCHAR
                    AND pgqueue.queues.paused_at IS NOT NULL
                    AND (pgqueue.queues.paused_until IS NULL OR pgqueue.queues.paused_until > now())))
            AND (pgqueue.jobs.expires_at IS NULL OR pgqueue.jobs.expires_at > now())
            AND (
                SELECT set_config(%(set_config_2)s::VARCHAR, %(set_config_3)s::VARCHAR, true) AS set_config_1) IS NOT
                    NULL
            ORDER BY pgqueue.jobs.run_at, pgqueue.jobs.id
            LIMIT %(limit)s::INTEGER
            FOR UPDATE SKIP LOCKED) AS due ON true
        LIMIT %(limit)s::INTEGER))
RETURNING pgqueue.jobs.id, pgqueue.jobs.task, CAST(pgqueue.jobs.payload AS TEXT) AS payload, pgqueue.jobs.priority,
    pgqueue.jobs.run_at, pgqueue.jobs.attempt, pgqueue.jobs.retries, pgqueue.jobs.max_retries,
    pgqueue.jobs.created_at, CAST(pgqueue.jobs.metadata AS TEXT) AS metadata, CAST(extract(epoch
        FROM now() - pgqueue.jobs.expires_at) AS double precision) AS expired;
