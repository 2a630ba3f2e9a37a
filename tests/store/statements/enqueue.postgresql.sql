INSERT INTO pgqueue.jobs (queue, task, payload, priority, run_at, max_retries, metadata)
VALUES (%(queue)s::VARCHAR, %(task)s::VARCHAR, CAST(%(payload)s::VARCHAR AS jsonb), %(priority)s::SMALLINT, now(),
    %(max_retries)s::SMALLINT, CAST(%(metadata)s::VARCHAR AS jsonb))
RETURNING pgqueue.jobs.id;
