UPDATE pgqueue_jobs
SET status='pending', claim_token=NULL, claim_expires_at=NULL
WHERE pgqueue_jobs.status = 'running'
AND pgqueue_jobs.claim_token = ?
RETURNING id, queue, task, attempt, claimed_by, claimed_at;
