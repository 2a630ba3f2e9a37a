UPDATE pgqueue.jobs
SET status='pending', claim_token=NULL, claim_expires_at=NULL
WHERE pgqueue.jobs.status = 'running'
AND pgqueue.jobs.claim_token = %(claim_token_1)s::UUID
RETURNING pgqueue.jobs.id, pgqueue.jobs.queue, pgqueue.jobs.task, pgqueue.jobs.attempt, pgqueue.jobs.claimed_by,
    pgqueue.jobs.claimed_at;
