SELECT pgqueue.jobs.id, pgqueue.jobs.task, pgqueue.jobs.status, pgqueue.jobs.unique_key
FROM pgqueue.jobs
WHERE pgqueue.jobs.prune_at <= now()
AND (pgqueue.jobs.status IN ('completed', 'dead', 'cancelled'))
AND coalesce(pgqueue.jobs.slot, 'held') = 'held'
AND NOT pgqueue.jobs.leads_order
AND pgqueue.jobs.prune_at >= %(since)s::TIMESTAMP WITH TIME ZONE
ORDER BY pgqueue.jobs.prune_at
LIMIT %(limit)s::INTEGER
FOR UPDATE SKIP LOCKED;
