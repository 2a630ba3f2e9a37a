UPDATE pgqueue_schedule_ticks
SET job_id=?
WHERE pgqueue_schedule_ticks.schedule = ?
AND pgqueue_schedule_ticks.tick_at = ?;
