UPDATE pgqueue_jobs
SET status=CASE WHEN (pgqueue_jobs.cancel_requested_at IS NOT NULL) THEN 'cancelled' ELSE 'pending' END,
    claim_token=NULL, claim_expires_at=NULL, finished_at=CASE WHEN (pgqueue_jobs.cancel_requested_at IS NOT NULL) THEN
    strftime('%Y-%m-%d %H:%M:%f', 'now') END, cancel_requested_at=NULL
WHERE pgqueue_jobs.status = 'running'
AND pgqueue_jobs.claim_token = ?
RETURNING id, queue, task, attempt, status, claimed_by, claimed_at;
