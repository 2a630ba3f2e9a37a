SELECT (
    SELECT pgqueue.jobs.claim_expires_at
    FROM pgqueue.jobs
    WHERE pgqueue.jobs.status = 'running'
    AND pgqueue.jobs.claim_expires_at < now()
    AND pgqueue.jobs.claim_expires_at >= %(since_lapsed)s::TIMESTAMP WITH TIME ZONE
    ORDER BY pgqueue.jobs.claim_expires_at
    LIMIT 1) AS lapsed, (
    SELECT pgqueue.jobs.expires_at
    FROM pgqueue.jobs
    WHERE pgqueue.jobs.status = 'pending'
    AND pgqueue.jobs.expires_at < now()
    AND pgqueue.jobs.expires_at >= %(since_expired)s::TIMESTAMP WITH TIME ZONE
    ORDER BY pgqueue.jobs.expires_at
    LIMIT 1) AS expired, (
    SELECT pgqueue.jobs.prune_at
    FROM pgqueue.jobs
    WHERE pgqueue.jobs.prune_at < now()
    AND pgqueue.jobs.prune_at >= %(since_prunable)s::TIMESTAMP WITH TIME ZONE
    ORDER BY pgqueue.jobs.prune_at
    LIMIT 1) AS prunable, now() AS until;
