SELECT (
    SELECT CAST(extract(epoch
            FROM now() - min(pgqueue.schedules.next_tick_at)) AS double precision) AS anon_1
    FROM pgqueue.schedules
    WHERE pgqueue.schedules.enabled
    AND (pgqueue.schedules.declared_at IS NULL OR pgqueue.schedules.declared_at > now() + make_interval(secs =>
        CAST(%(param_1)s AS double precision)))
    AND NOT pgqueue.schedules.name = ANY (%(aside)s::TEXT[])
    AND pgqueue.schedules.task = ANY (%(tasks)s::TEXT[])) AS known, (
    SELECT CAST(extract(epoch
            FROM now() - min(pgqueue.schedules.next_tick_at)) AS double precision) AS anon_1
    FROM pgqueue.schedules
    WHERE pgqueue.schedules.enabled
    AND (pgqueue.schedules.declared_at IS NULL OR pgqueue.schedules.declared_at > now() + make_interval(secs =>
        CAST(%(param_1)s AS double precision)))
    AND NOT pgqueue.schedules.name = ANY (%(aside)s::TEXT[])) AS "any";
