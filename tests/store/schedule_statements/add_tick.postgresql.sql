INSERT INTO pgqueue.schedule_ticks (schedule, tick_at)
VALUES (%(schedule)s::VARCHAR, %(tick_at)s::TIMESTAMP WITH TIME ZONE)
ON CONFLICT (schedule, tick_at) DO NOTHING
RETURNING pgqueue.schedule_ticks.schedule;
