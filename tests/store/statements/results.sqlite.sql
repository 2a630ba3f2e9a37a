SELECT pgqueue_jobs.id, pgqueue_jobs.status, CASE WHEN (pgqueue_jobs.status = 'completed') THEN
    CAST(pgqueue_jobs.result AS TEXT) END AS result, CASE WHEN (pgqueue_jobs.status = 'dead') THEN
    CAST(pgqueue_jobs.error AS TEXT) END AS error
FROM pgqueue_jobs
WHERE pgqueue_jobs.id IN (
    SELECT value
    FROM json_each(?));
