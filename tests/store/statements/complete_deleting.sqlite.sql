DELETE
FROM pgqueue_jobs
WHERE pgqueue_jobs.id IN (
    SELECT value
    FROM json_each(?))
AND pgqueue_jobs.claim_token = ?
AND pgqueue_jobs.slot IS NULL
AND pgqueue_jobs.leads_order = 0
RETURNING id, unique_key IS NOT NULL OR cancel_requested_at IS NOT NULL AS anon_1;
