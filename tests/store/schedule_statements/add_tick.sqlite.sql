INSERT INTO pgqueue_schedule_ticks (schedule, tick_at, job_id)
VALUES (?, ?, ?)
ON CONFLICT (schedule, tick_at) DO NOTHING
RETURNING schedule;
