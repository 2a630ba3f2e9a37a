SELECT pgqueue_schedules.name, pgqueue_schedules.cron, pgqueue_schedules.timezone, pgqueue_schedules.task,
    pgqueue_schedules.queue, pgqueue_schedules.priority, pgqueue_schedules.max_retries, pgqueue_schedules.catchup,
    pgqueue_schedules.overlap, pgqueue_schedules.enabled, pgqueue_schedules.declared_by,
    pgqueue_schedules.next_tick_at, pgqueue_schedules.created_at, pgqueue_schedules.updated_at,
    CAST(pgqueue_schedules.payload AS TEXT) AS payload_json, ((julianday('now') -
    julianday(pgqueue_schedules.declared_at)) * 86400.0) AS declared_seconds, strftime('%Y-%m-%d %H:%M:%f', 'now') AS
    now
FROM pgqueue_schedules
WHERE pgqueue_schedules.enabled = 1
AND (pgqueue_schedules.declared_at IS NULL OR pgqueue_schedules.declared_at > strftime('%Y-%m-%d %H:%M:%f', 'now',
    printf('%+.3f seconds', ?)))
AND pgqueue_schedules.name IN (
    SELECT value
    FROM json_each(?)) = 0
AND pgqueue_schedules.next_tick_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')
AND (pgqueue_schedules.task IN (
        SELECT value
        FROM json_each(?)) OR pgqueue_schedules.next_tick_at <= strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f
            seconds', ?)))
ORDER BY pgqueue_schedules.next_tick_at, pgqueue_schedules.name
LIMIT ? OFFSET ?;
