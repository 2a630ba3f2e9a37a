INSERT INTO pgqueue_jobs (queue, task, payload, priority, run_at, max_retries, unique_key, metadata)
VALUES (?, ?, ?, ?, strftime('%Y-%m-%d %H:%M:%f', 'now'), ?, ?, ?)
ON CONFLICT (task, unique_key)
WHERE unique_key IS NOT NULL
AND status IN ('pending', 'running') DO NOTHING
RETURNING id;

SELECT pgqueue_jobs.id, pgqueue_jobs.status
FROM pgqueue_jobs
WHERE pgqueue_jobs.task = ?
AND pgqueue_jobs.unique_key = ?
AND status IN ('pending', 'running');
