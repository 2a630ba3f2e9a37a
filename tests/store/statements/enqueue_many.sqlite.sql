INSERT INTO pgqueue_jobs (task, payload, queue, priority, max_retries, metadata, run_at)
SELECT ? AS task, d.value AS payload, ? AS queue, ? AS priority, ? AS max_retries, ? AS metadata, strftime('%Y-%m-%d
    %H:%M:%f', 'now') AS run_at
FROM json_each(?) AS d
ORDER BY d."key"
RETURNING id;
