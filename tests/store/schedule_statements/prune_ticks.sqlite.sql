SELECT pgqueue_schedule_ticks.schedule, pgqueue_schedule_ticks.tick_at
FROM pgqueue_schedule_ticks
WHERE pgqueue_schedule_ticks.created_at < strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', ?))
ORDER BY pgqueue_schedule_ticks.created_at
LIMIT ? OFFSET ?;

DELETE
FROM pgqueue_schedule_ticks
WHERE pgqueue_schedule_ticks.schedule = ?
AND pgqueue_schedule_ticks.tick_at = ?;
