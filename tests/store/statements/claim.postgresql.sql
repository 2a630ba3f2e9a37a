WITH RECURSIVE lane(priority, run_at, id) AS (
    SELECT 32768 AS priority, CAST(NULL AS TIMESTAMP WITH TIME ZONE) AS run_at, CAST(NULL AS BIGINT) AS id
    UNION ALL
    SELECT following.priority AS priority, following.run_at AS run_at, following.id AS id
    FROM lane
    JOIN LATERAL (
        SELECT CAST(pgqueue.jobs.priority AS INTEGER) AS priority, pgqueue.jobs.run_at AS run_at, pgqueue.jobs.id AS
            id
        FROM pgqueue.jobs
        WHERE pgqueue.jobs.queue = %(of_queue)s::VARCHAR
        AND pgqueue.jobs.status = 'pending'
        AND pgqueue.jobs.waits_for IS NULL
        AND pgqueue.jobs.priority < lane.priority
        ORDER BY pgqueue.jobs.priority DESC, pgqueue.jobs.run_at, pgqueue.jobs.id
        LIMIT 1) AS following ON true)
SELECT lane.priority, CASE WHEN (lane.run_at <= now()) THEN lane.run_at END AS run_at, CASE WHEN (lane.run_at <=
    now()) THEN lane.id - 1 ELSE 0 END AS id_before, EXISTS (
    SELECT 1
    FROM pgqueue.limits
    WHERE (pgqueue.limits.scope = 'queue'
        AND pgqueue.limits.name = %(of_queue)s::VARCHAR OR pgqueue.limits.scope = 'task')
    AND (coalesce(pgqueue.limits.concurrency, pgqueue.limits.key_concurrency, pgqueue.limits.rate,
        pgqueue.limits.promote_after) IS NOT NULL OR pgqueue.limits.ordered OR pgqueue.limits.releasing)) AS limited
FROM (
    SELECT lane.priority AS priority, lane.run_at AS run_at, lane.id AS id
    FROM lane
    WHERE lane.priority < 32768) AS lane;

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
            AND NOT (EXISTS (
                    SELECT 1
                    FROM pgqueue.limits
                    WHERE (pgqueue.limits.scope = 'queue'
                        AND pgqueue.limits.name = %(of_queue)s::VARCHAR OR pgqueue.limits.scope = 'task'
                        AND pgqueue.limits.name = ANY (%(tasks)s::TEXT[]))
                    AND (coalesce(pgqueue.limits.concurrency, pgqueue.limits.key_concurrency, pgqueue.limits.rate,
                        pgqueue.limits.promote_after) IS NOT NULL OR pgqueue.limits.ordered OR
                        pgqueue.limits.releasing)))
            AND NOT (EXISTS (
                    SELECT 1
                    FROM pgqueue.queues
                    WHERE pgqueue.queues.name = %(of_queue)s::VARCHAR
                    AND pgqueue.queues.paused_at IS NOT NULL
                    AND (pgqueue.queues.paused_until <= now()) IS NOT true))
            AND (pgqueue.jobs.expires_at <= now()) IS NOT true
            AND pgqueue.jobs.task = ANY (%(tasks)s::TEXT[])
            ORDER BY pgqueue.jobs.run_at, pgqueue.jobs.id
            LIMIT %(limit)s::INTEGER
            FOR UPDATE SKIP LOCKED) AS due ON true
        LIMIT %(limit)s::INTEGER))
RETURNING pgqueue.jobs.id, pgqueue.jobs.task, CAST(pgqueue.jobs.payload AS TEXT) AS payload, pgqueue.jobs.priority,
    CAST(date_part('epoch', pgqueue.jobs.run_at) * 1000000 AS bigint) AS run_at, pgqueue.jobs.attempt,
    pgqueue.jobs.retries, pgqueue.jobs.max_retries, CAST(date_part('epoch', pgqueue.jobs.created_at) * 1000000 AS
    bigint) AS created_at, CAST(pgqueue.jobs.metadata AS TEXT) AS metadata, CAST(extract(epoch
        FROM now() - pgqueue.jobs.expires_at) AS double precision) AS expired;
