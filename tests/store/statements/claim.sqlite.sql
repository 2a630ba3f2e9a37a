UPDATE pgqueue_jobs
SET status='running', claimed_by=?, claim_token=?, claim_expires_at=strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f
    seconds', ?)), attempt=CASE WHEN (pgqueue_jobs.attempt < 2147483647) THEN pgqueue_jobs.attempt + 1 ELSE 2147483647
    END, claimed_at=strftime('%Y-%m-%d %H:%M:%f', 'now')
WHERE pgqueue_jobs.id IN (
    SELECT pgqueue_jobs.id
    FROM pgqueue_jobs
    WHERE pgqueue_jobs.queue = ?
    AND pgqueue_jobs.status = 'pending'
    AND pgqueue_jobs.waits_for IS NULL
    AND pgqueue_jobs.run_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')
    AND NOT (EXISTS (
            SELECT 1
            FROM pgqueue_limits
            WHERE (pgqueue_limits.scope = 'queue'
                AND pgqueue_limits.name = ? OR pgqueue_limits.scope = 'task'
                AND pgqueue_limits.name IN (
                    SELECT value
                    FROM json_each(?)))
            AND (coalesce(pgqueue_limits.concurrency, pgqueue_limits.key_concurrency, pgqueue_limits.rate,
                pgqueue_limits.promote_after) IS NOT NULL OR pgqueue_limits.ordered = 1 OR pgqueue_limits.releasing =
                1)))
    AND NOT (EXISTS (
            SELECT 1
            FROM pgqueue_queues
            WHERE pgqueue_queues.name = ?
            AND pgqueue_queues.paused_at IS NOT NULL
            AND (pgqueue_queues.paused_until <= strftime('%Y-%m-%d %H:%M:%f', 'now')) IS NOT 1))
    AND (pgqueue_jobs.expires_at <= strftime('%Y-%m-%d %H:%M:%f', 'now')) IS NOT 1
    AND pgqueue_jobs.task IN (
        SELECT value
        FROM json_each(?))
    ORDER BY pgqueue_jobs.priority DESC, pgqueue_jobs.run_at, pgqueue_jobs.id
    LIMIT ? OFFSET ?)
RETURNING id, task, CAST(payload AS TEXT) AS payload, priority, (strftime('%s', run_at) * 1000000 +
    substr(strftime('%f', run_at), 4) * 1000) AS run_at, attempt, retries, max_retries, (strftime('%s', created_at) *
    1000000 + substr(strftime('%f', created_at), 4) * 1000) AS created_at, CAST(metadata AS TEXT) AS metadata,
    ((julianday('now') - julianday(expires_at)) * 86400.0) AS expired;
