INSERT INTO pgqueue.jobs (task, payload, queue, priority, max_retries, metadata, run_at)
SELECT %(task)s::VARCHAR AS task, CAST(d.document AS JSONB) AS payload, %(queue)s::VARCHAR AS queue,
    %(priority)s::SMALLINT AS priority, %(max_retries)s::SMALLINT AS max_retries, CAST(%(metadata)s::VARCHAR AS jsonb)
    AS metadata, now() AS run_at
FROM json_array_elements(CAST(%(payloads)s::VARCHAR AS JSON)) WITH ORDINALITY AS d(document, n)
ORDER BY d.n
RETURNING pgqueue.jobs.id;
