UPDATE pgqueue_jobs
SET status='completed', claim_token=NULL, claim_expires_at=NULL, finished_at=strftime('%Y-%m-%d %H:%M:%f', 'now')
WHERE pgqueue_jobs.id IN (
    SELECT value
    FROM json_each(?))
AND pgqueue_jobs.claim_token = ?
RETURNING id;
