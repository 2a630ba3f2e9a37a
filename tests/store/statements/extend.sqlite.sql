UPDATE pgqueue_jobs
SET claim_expires_at=strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', ?))
WHERE pgqueue_jobs.id IN (
    SELECT pgqueue_jobs.id
    FROM pgqueue_jobs
    JOIN (
        SELECT json_extract(e.value, ?) AS id, json_extract(e.value, ?) AS token
        FROM json_each(?) AS e) AS r ON pgqueue_jobs.id = r.id
    AND pgqueue_jobs.claim_token = r.token);

SELECT pgqueue_jobs.id, pgqueue_jobs.cancel_requested_at IS NOT NULL AS asked
FROM pgqueue_jobs
JOIN (
    SELECT json_extract(e.value, ?) AS id, json_extract(e.value, ?) AS token
    FROM json_each(?) AS e) AS r ON pgqueue_jobs.id = r.id
AND pgqueue_jobs.claim_token = r.token;
