INSERT INTO pgqueue_jobs (task, payload, unique_key)
VALUES (?, ?, ?)
ON CONFLICT (task, unique_key)
WHERE unique_key IS NOT NULL
AND status IN ('pending', 'running') DO NOTHING
RETURNING id;

SELECT pgqueue_jobs.id, pgqueue_jobs.status
FROM pgqueue_jobs
WHERE pgqueue_jobs.task = ?
AND pgqueue_jobs.unique_key = ?
AND status IN ('pending', 'running');
