INSERT INTO pgqueue.jobs (queue, task, payload, priority, run_at, max_retries, unique_key, metadata)
VALUES (%(queue)s::VARCHAR, %(task)s::VARCHAR, CAST(%(payload)s::VARCHAR AS jsonb), %(priority)s::SMALLINT, now(),
    %(max_retries)s::SMALLINT, %(unique_key)s::VARCHAR, CAST(%(metadata)s::VARCHAR AS jsonb))
ON CONFLICT (task, unique_key)
WHERE unique_key IS NOT NULL
AND status IN ('pending', 'running') DO NOTHING
RETURNING pgqueue.jobs.id;

SELECT pgqueue.jobs.id, pgqueue.jobs.status
FROM pgqueue.jobs
WHERE pgqueue.jobs.task = %(task)s::VARCHAR
AND pgqueue.jobs.unique_key = %(unique_key)s::VARCHAR
AND status IN ('pending', 'running');
