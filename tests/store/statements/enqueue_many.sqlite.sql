INSERT INTO pgqueue_jobs (task, payload)
SELECT ? AS task, d.value AS payload
FROM json_each(?) AS d
ORDER BY d."key"
RETURNING id;
