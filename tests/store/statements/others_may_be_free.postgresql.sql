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
        LIMIT %(param_2)s::INTEGER) AS anon_2
    FROM lane
    WHERE lane.priority IS NOT NULL)
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
        AND (pgqueue.queues.paused_until IS NULL OR pgqueue.queues.paused_until > now())))
AND NOT (EXISTS (
        SELECT due.id
        FROM (
            SELECT lane.priority AS priority
            FROM lane
            WHERE lane.priority IS NOT NULL) AS lane
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
                    AND (pgqueue.queues.paused_until IS NULL OR pgqueue.queues.paused_until > now())))
            AND (pgqueue.jobs.expires_at IS NULL OR pgqueue.jobs.expires_at > now())
            AND pgqueue.jobs.task = ANY (%(tasks)s::TEXT[])
            AND pgqueue.jobs.priority = lane.priority
            ORDER BY pgqueue.jobs.run_at, pgqueue.jobs.id
            LIMIT %(param_3)s::INTEGER) AS due ON true)) AS anon_1;
