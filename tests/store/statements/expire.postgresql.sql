UPDATE pgqueue.jobs
SET status='dead', error=CAST(%(param_1)s::VARCHAR AS jsonb), finished_at=now(), waits_for=NULL, prune_at=(
    SELECT now() + make_interval(secs => CAST(pgqueue.limits.keep_dead AS double precision)) AS anon_1
    FROM pgqueue.limits
    WHERE pgqueue.limits.scope = 'task'
    AND pgqueue.limits.name = pgqueue.jobs.task
    AND pgqueue.limits.keep_dead IS NOT NULL)
WHERE pgqueue.jobs.id = ANY (ARRAY(
        SELECT pgqueue.jobs.id
        FROM pgqueue.jobs
        WHERE pgqueue.jobs.status = 'pending'
        AND pgqueue.jobs.expires_at <= now()
        AND pgqueue.jobs.expires_at >= %(since)s::TIMESTAMP WITH TIME ZONE
        ORDER BY pgqueue.jobs.expires_at
        LIMIT %(limit)s::INTEGER
        FOR UPDATE SKIP LOCKED))
RETURNING pgqueue.jobs.id, pgqueue.jobs.queue, pgqueue.jobs.task, pgqueue.jobs.attempt;
