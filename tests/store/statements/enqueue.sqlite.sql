INSERT INTO pgqueue_jobs (queue, task, payload, priority, run_at, max_retries, metadata)
VALUES (?, ?, ?, ?, strftime('%Y-%m-%d %H:%M:%f', 'now'), ?, ?)
RETURNING id;
