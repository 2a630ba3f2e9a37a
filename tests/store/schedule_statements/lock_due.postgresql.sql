SELECT pgqueue.schedules.name, pgqueue.schedules.cron, pgqueue.schedules.timezone, pgqueue.schedules.task,
    pgqueue.schedules.queue, pgqueue.schedules.priority, pgqueue.schedules.max_retries, pgqueue.schedules.catchup,
    pgqueue.schedules.overlap, pgqueue.schedules.enabled, pgqueue.schedules.declared_by,
    pgqueue.schedules.next_tick_at, pgqueue.schedules.created_at, pgqueue.schedules.updated_at,
    CAST(pgqueue.schedules.payload AS TEXT) AS payload_json, CAST(extract(epoch
        FROM now() - pgqueue.schedules.declared_at) AS double precision) AS declared_seconds, now() AS now
FROM pgqueue.schedules
WHERE pgqueue.schedules.enabled
AND (pgqueue.schedules.declared_at IS NULL OR pgqueue.schedules.declared_at > now() + make_interval(secs =>
    CAST(%(param_1)s AS double precision)))
AND NOT pgqueue.schedules.name = ANY (%(aside)s::TEXT[])
AND pgqueue.schedules.next_tick_at <= now()
AND (pgqueue.schedules.task = ANY (%(tasks)s::TEXT[]) OR pgqueue.schedules.next_tick_at <= now() + make_interval(secs
    => CAST(%(param_2)s AS double precision)))
ORDER BY pgqueue.schedules.next_tick_at, pgqueue.schedules.name
LIMIT %(limit)s::INTEGER
FOR UPDATE SKIP LOCKED;
