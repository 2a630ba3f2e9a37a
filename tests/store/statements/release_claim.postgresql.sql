UPDATE pgqueue.jobs
SET status=CASE WHEN (pgqueue.jobs.cancel_requested_at IS NOT NULL) THEN 'cancelled' ELSE 'pending' END,
    claim_token=NULL, claim_expires_at=NULL, finished_at=CASE WHEN (pgqueue.jobs.cancel_requested_at IS NOT NULL) THEN
    now() END, cancel_requested_at=NULL
WHERE pgqueue.jobs.status = 'running'
AND pgqueue.jobs.claim_token = %(claim_token_1)s::UUID
RETURNING pgqueue.jobs.id, pgqueue.jobs.queue, pgqueue.jobs.task, pgqueue.jobs.attempt, pgqueue.jobs.status,
    pgqueue.jobs.claimed_by, pgqueue.jobs.claimed_at;
