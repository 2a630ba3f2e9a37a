DELETE
FROM pgqueue.jobs
WHERE pgqueue.jobs.id = ANY (CAST(%(ids)s::VARCHAR AS bigint[]))
AND pgqueue.jobs.claim_token = %(token)s::UUID
AND coalesce(pgqueue.jobs.slot, 'held') = 'held'
AND NOT pgqueue.jobs.leads_order
RETURNING pgqueue.jobs.id, (
    SELECT e.id
    FROM pgqueue.job_events AS e
    WHERE e.job_id = pgqueue.jobs.id
    LIMIT 1) IS NOT NULL AS has_events;
