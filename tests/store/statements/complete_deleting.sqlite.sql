DELETE
FROM pgqueue_jobs
WHERE pgqueue_jobs.id IN (
    SELECT value
    FROM json_each(?))
AND pgqueue_jobs.claim_token = ?
AND coalesce(pgqueue_jobs.slot, 'held') = 'held'
AND pgqueue_jobs.leads_order = 0
RETURNING id, unique_key IS NOT NULL OR cancel_requested_at IS NOT NULL AS anon_1;
