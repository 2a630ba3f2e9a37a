DELETE
FROM pgqueue.jobs
WHERE pgqueue.jobs.id = ANY (CAST(%(ids)s::VARCHAR AS bigint[]))
AND pgqueue.jobs.claim_token = %(token)s::UUID
AND coalesce(pgqueue.jobs.slot, 'held') = 'held'
AND NOT pgqueue.jobs.leads_order
RETURNING pgqueue.jobs.id, pgqueue.jobs.unique_key IS NOT NULL OR pgqueue.jobs.cancel_requested_at IS NOT NULL AS
    anon_1;
