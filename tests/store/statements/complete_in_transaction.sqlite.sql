UPDATE pgqueue_jobs
SET status='completed', claim_token=NULL, claim_expires_at=NULL, result=?, finished_at=strftime('%Y-%m-%d %H:%M:%f',
    'now')
WHERE pgqueue_jobs.id = ?
AND pgqueue_jobs.claim_token = ?
RETURNING id;
