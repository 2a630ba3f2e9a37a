SELECT (
    SELECT ((julianday('now') - julianday(min(pgqueue_schedules.next_tick_at))) * 86400.0) AS anon_1
    FROM pgqueue_schedules
    WHERE pgqueue_schedules.enabled = 1
    AND (pgqueue_schedules.declared_at IS NULL OR pgqueue_schedules.declared_at > strftime('%Y-%m-%d %H:%M:%f', 'now',
        printf('%+.3f seconds', ?)))
    AND pgqueue_schedules.name IN (
        SELECT value
        FROM json_each(?)) = 0
    AND pgqueue_schedules.task IN (
        SELECT value
        FROM json_each(?))) AS known, (
    SELECT ((julianday('now') - julianday(min(pgqueue_schedules.next_tick_at))) * 86400.0) AS anon_1
    FROM pgqueue_schedules
    WHERE pgqueue_schedules.enabled = 1
    AND (pgqueue_schedules.declared_at IS NULL OR pgqueue_schedules.declared_at > strftime('%Y-%m-%d %H:%M:%f', 'now',
        printf('%+.3f seconds', ?)))
    AND pgqueue_schedules.name IN (
        SELECT value
        FROM json_each(?)) = 0) AS any;
