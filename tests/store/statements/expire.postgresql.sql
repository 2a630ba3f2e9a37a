UPDATE pgqueue.jobs
SET status='dead', error=CAST(%(param_1)s::VARCHAR AS jsonb), finished_at=now(), waits_for=NULL
WHERE pgqueue.jobs.id = ANY (ARRAY(
        SELECT pgqueue.jobs.id
        FROM pgqueue.jobs
        WHERE pgqueue.jobs.status = 'pending'
        AND pgqueue.jobs.expires_at <= now()
        ORDER BY pgqueue.jobs.expires_at
        LIMIT %(limit)s::INTEGER
        FOR UPDATE SKIP LOCKED))
RETURNING pgqueue.jobs.id, pgqueue.jobs.queue, pgqueue.jobs.task, pgqueue.jobs.attempt;
