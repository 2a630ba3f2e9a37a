INSERT INTO pgqueue_jobs (task, payload)
VALUES (?, ?)
RETURNING id;
