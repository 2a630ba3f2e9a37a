SELECT (
    SELECT pgqueue_jobs.claim_expires_at
    FROM pgqueue_jobs
    WHERE pgqueue_jobs.status = 'running'
    AND pgqueue_jobs.claim_expires_at < strftime('%Y-%m-%d %H:%M:%f', 'now')
    AND pgqueue_jobs.claim_expires_at >= substr(?, 1, 19)
    ORDER BY pgqueue_jobs.claim_expires_at
    LIMIT 1 OFFSET ?) AS lapsed, (
    SELECT pgqueue_jobs.expires_at
    FROM pgqueue_jobs
    WHERE pgqueue_jobs.status = 'pending'
    AND pgqueue_jobs.expires_at < strftime('%Y-%m-%d %H:%M:%f', 'now')
    AND pgqueue_jobs.expires_at >= substr(?, 1, 19)
    ORDER BY pgqueue_jobs.expires_at
    LIMIT 1 OFFSET ?) AS expired, (
    SELECT pgqueue_jobs.prune_at
    FROM pgqueue_jobs
    WHERE pgqueue_jobs.prune_at < strftime('%Y-%m-%d %H:%M:%f', 'now')
    AND pgqueue_jobs.prune_at >= substr(?, 1, 19)
    ORDER BY pgqueue_jobs.prune_at
    LIMIT 1 OFFSET ?) AS prunable, strftime('%Y-%m-%d %H:%M:%f', 'now') AS until;
