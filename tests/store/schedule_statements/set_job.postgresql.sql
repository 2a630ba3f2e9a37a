UPDATE pgqueue.schedule_ticks
SET job_id=%(job_id)s::BIGINT
WHERE pgqueue.schedule_ticks.schedule = %(schedule_1)s::VARCHAR
AND pgqueue.schedule_ticks.tick_at = %(tick_at_1)s::TIMESTAMP WITH TIME ZONE;
