SELECT (EXISTS (
        SELECT *
        FROM pgqueue_workers
        WHERE pgqueue_workers.id != ?
        AND pgqueue_workers.heartbeat_at > strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', ?))
        AND CASE WHEN json_valid(pgqueue_workers.queues) THEN CAST(pgqueue_workers.queues ->> ? AS TEXT) END IS NOT
            NULL))
AND NOT (EXISTS (
        SELECT *
        FROM pgqueue_queues
        WHERE pgqueue_queues.name = ?
        AND pgqueue_queues.paused_at IS NOT NULL
        AND (pgqueue_queues.paused_until <= strftime('%Y-%m-%d %H:%M:%f', 'now')) IS NOT 1))
AND NOT (EXISTS (
        SELECT pgqueue_jobs.id
        FROM pgqueue_jobs
        WHERE pgqueue_jobs.queue = ?
        AND pgqueue_jobs.status = 'pending'
        AND pgqueue_jobs.waits_for IS NULL
        AND pgqueue_jobs.run_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')
        AND NOT (EXISTS (
                SELECT 1
                FROM pgqueue_queues
                WHERE pgqueue_queues.name = ?
                AND pgqueue_queues.paused_at IS NOT NULL
                AND (pgqueue_queues.paused_until <= strftime('%Y-%m-%d %H:%M:%f', 'now')) IS NOT 1))
        AND (pgqueue_jobs.expires_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')) IS NOT 1
        AND pgqueue_jobs.task IN (
            SELECT value
            FROM json_each(?)))) AS anon_1;
