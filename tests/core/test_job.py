"""A job as its holders see it."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from pgqueue import ClaimedJob

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_claimed_job_does_not_show_its_payload_or_metadata() -> None:
    job = ClaimedJob(
        id=7,
        queue="default",
        task="work",
        payload_json='{"card": "4111"}',
        priority=0,
        run_at=MOMENT,
        attempt=1,
        retries=0,
        max_retries=3,
        claimed_by="worker-1",
        claim_token=uuid.uuid4(),
        created_at=MOMENT,
        metadata_json='{"authorization": "Bearer"}',
    )

    shown = repr(job)

    assert "id=7" in shown
    assert "4111" not in shown
    assert "Bearer" not in shown
    assert (job.payload, job.metadata) == ({"card": "4111"}, {"authorization": "Bearer"})
