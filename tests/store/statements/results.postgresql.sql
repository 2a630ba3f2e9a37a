SELECT pgqueue.jobs.id, pgqueue.jobs.status, CASE WHEN (pgqueue.jobs.status = 'completed') THEN
    CAST(pgqueue.jobs.result AS TEXT) END AS result, CASE WHEN (pgqueue.jobs.status = 'dead') THEN
    CAST(pgqueue.jobs.error AS TEXT) END AS error
FROM pgqueue.jobs
WHERE pgqueue.jobs.id = ANY (CAST(%(ids)s::VARCHAR AS bigint[]));
