SELECT pgqueue.schedule_ticks.schedule, pgqueue.schedule_ticks.tick_at
FROM pgqueue.schedule_ticks
WHERE pgqueue.schedule_ticks.created_at < now() + make_interval(secs => CAST(%(param_1)s AS double precision))
ORDER BY pgqueue.schedule_ticks.created_at
LIMIT %(limit)s::INTEGER
FOR UPDATE SKIP LOCKED;

DELETE
FROM pgqueue.schedule_ticks
WHERE pgqueue.schedule_ticks.schedule = %(name)s::VARCHAR
AND pgqueue.schedule_ticks.tick_at = %(tick)s::TIMESTAMP WITH TIME ZONE;
