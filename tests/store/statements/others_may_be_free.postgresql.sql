WITH RECURSIVE lane(priority) AS (
    SELECT 32768 AS priority
    UNION ALL
    SELECT following.priority AS priority
    FROM lane
    JOIN LATERAL (
        SELECT CAST(pgqueue.jobs.priority AS INTEGER) AS priority
        FROM pgqueue.jobs
        WHERE pgqueue.jobs.queue = %(of_queue)s::VARCHAR
        AND pgqueue.jobs.status = 'pending'
        AND pgqueue.jobs.waits_for IS NULL
        AND pgqueue.jobs.priority < lane.priority
        ORDER BY pgqueue.jobs.priority DESC
        LIMIT 1) AS following ON true)
SELECT (EXISTS (
        SELECT *
        FROM pgqueue.workers
        WHERE pgqueue.workers.id != %(worker)s::VARCHAR
        AND pgqueue.workers.heartbeat_at > now() + make_interval(secs => CAST(%(seconds)s AS double precision))
        AND (pgqueue.workers.queues ->> %(of_queue)s::VARCHAR) IS NOT NULL))
AND NOT (EXISTS (
        SELECT *
        FROM pgqueue.queues
        WHERE pgqueue.queues.name = %(of_queue)s::VARCHAR
        AND pgqueue.queues.paused_at IS NOT NULL
        AND (pgqueue.queues.paused_until <= now()) IS NOT true))
AND NOT (EXISTS (
        SELECT due.id
        FROM (
            SELECT lane.priority AS priority
            FROM lane
            WHERE lane.priority < 32768) AS lane
        JOIN LATERAL (
            SELECT pgqueue.jobs.id AS id
            FROM pgqueue.jobs
            WHERE pgqueue.jobs.queue = %(of_queue)s::VARCHAR
            AND pgqueue.jobs.status = 'pending'
            AND pgqueue.jobs.waits_for IS NULL
            AND pgqueue.jobs.run_at <= now()
            AND NOT (EXISTS (
                    SELECT 1
                    FROM pgqueue.queues
                    WHERE pgqueue.queues.name = %(of_queue)s::VARCHAR
                    AND pgqueue.queues.paused_at IS NOT NULL
                    AND (pgqueue.queues.paused_until <= now()) IS NOT true))
            AND (pgqueue.jobs.expires_at <= now()) IS NOT true
            AND pgqueue.jobs.task = ANY (%(tasks)s::TEXT[])
            AND pgqueue.jobs.priority = lane.priority
            ORDER BY pgqueue.jobs.run_at, pgqueue.jobs.id
            LIMIT %(param_1)s::INTEGER) AS due ON true)) AS anon_1;
