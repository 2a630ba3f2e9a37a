INSERT INTO pgqueue.jobs (task, payload)
VALUES (%(task)s::VARCHAR, CAST(%(payload)s::VARCHAR AS jsonb))
RETURNING pgqueue.jobs.id;
