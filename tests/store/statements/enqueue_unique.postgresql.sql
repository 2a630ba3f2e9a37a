INSERT INTO pgqueue.jobs (task, payload, unique_key)
VALUES (%(task)s::VARCHAR, CAST(%(payload)s::VARCHAR AS jsonb), %(unique_key)s::VARCHAR)
ON CONFLICT (task, unique_key)
WHERE unique_key IS NOT NULL
AND status IN ('pending', 'running') DO NOTHING
RETURNING pgqueue.jobs.id;

SELECT pgqueue.jobs.id, pgqueue.jobs.status
FROM pgqueue.jobs
WHERE pgqueue.jobs.task = %(task)s::VARCHAR
AND pgqueue.jobs.unique_key = %(unique_key)s::VARCHAR
AND status IN ('pending', 'running');
