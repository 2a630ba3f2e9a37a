INSERT INTO pgqueue.schedule_ticks (schedule, tick_at, job_id)
VALUES (%(schedule)s::VARCHAR, %(tick_at)s::TIMESTAMP WITH TIME ZONE, %(job_id)s::BIGINT)
ON CONFLICT (schedule, tick_at) DO NOTHING
RETURNING pgqueue.schedule_ticks.schedule;
