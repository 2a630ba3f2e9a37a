DELETE
FROM pgqueue_jobs
WHERE pgqueue_jobs.id IN (
    SELECT value
    FROM json_each(?))
AND pgqueue_jobs.claim_token = ?
AND coalesce(pgqueue_jobs.slot, 'held') = 'held'
AND pgqueue_jobs.leads_order = 0
RETURNING id, (
    SELECT e.id
    FROM pgqueue_job_events AS e
    WHERE e.job_id = pgqueue_jobs.id
    LIMIT 1) IS NOT NULL AS has_events;
