INSERT INTO pgqueue.jobs (task, payload)
SELECT %(task)s::VARCHAR AS task, CAST(d.document AS JSONB) AS payload
FROM json_array_elements(CAST(%(payloads)s::VARCHAR AS JSON)) WITH ORDINALITY AS d(document, n)
ORDER BY d.n
RETURNING pgqueue.jobs.id;
