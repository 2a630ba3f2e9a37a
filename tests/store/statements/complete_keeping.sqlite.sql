UPDATE pgqueue_jobs
SET status='completed', claim_token=NULL, claim_expires_at=NULL, result=r.result, finished_at=strftime('%Y-%m-%d
    %H:%M:%f', 'now'), prune_at=strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', r.keep))
FROM (
    SELECT json_extract(e.value, ?) AS id, json_extract(e.value, ?) AS token, json_extract(e.value, ?) AS keep,
        json_extract(e.value, ?) AS result
    FROM json_each(?) AS e) AS r
WHERE pgqueue_jobs.id = r.id
AND pgqueue_jobs.claim_token = r.token
RETURNING id;
