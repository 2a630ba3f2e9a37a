from sqlalchemy.orm import Session

from pgqueue import PgQueue, Worker, WorkerConfig


def test_a_job_enqueued_in_a_session_is_completed_by_a_worker(pgq: PgQueue) -> None:
    @pgq.task
    def double(n: int) -> int:
        return 2 * n

    with Session(pgq.engine) as session, session.begin():
        enqueued = double.enqueue(session, n=21)

    Worker(pgq, WorkerConfig(drain=True)).run()

    job = pgq.get_job(enqueued.id)
    assert (job.status, job.result) == ("completed", 42)
