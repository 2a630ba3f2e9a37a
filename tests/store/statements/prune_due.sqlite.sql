SELECT pgqueue_jobs.id, pgqueue_jobs.task, pgqueue_jobs.status, pgqueue_jobs.unique_key
FROM pgqueue_jobs
WHERE pgqueue_jobs.prune_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')
AND (pgqueue_jobs.status IN ('completed', 'dead', 'cancelled'))
AND coalesce(pgqueue_jobs.slot, 'held') = 'held'
AND pgqueue_jobs.leads_order = 0
AND pgqueue_jobs.prune_at >= substr(?, 1, 19)
ORDER BY pgqueue_jobs.prune_at
LIMIT ? OFFSET ?;
