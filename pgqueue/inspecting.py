"""Looking at jobs, queues and workers, and waiting for results: nothing here changes anything."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from pgqueue import operations
from pgqueue.arguments import checked_id, checked_limit, checked_moment, checked_text
from pgqueue.errors import ConfigurationError
from pgqueue.handle import JobHandle, Waiting, wait, wait_async
from pgqueue.job import Job, JobStatus
from pgqueue.operations import JobFilter
from pgqueue.registry import Registry
from pgqueue.steps import Steps, look

#: Jobs that one page has.
PAGE_JOBS = 500


class Inspector(Registry):
    """Calls that only look."""

    # One job

    def get_job(self, job_id: int) -> Job:
        """The job as it stands. Raises JobNotFound."""
        return self._take(self._get_job(job_id))

    async def get_job_async(self, job_id: int) -> Job:
        """As `get_job`, without blocking the event loop."""
        return await self._take_async(self._get_job(job_id))

    def _get_job(self, job_id: int) -> Steps[Job]:
        checked_id(job_id)
        return look(lambda connection: operations.get_job(connection, self.tables, job_id))

    def job_events(self, job_id: int) -> list[dict[str, Any]]:
        """What was recorded of a job beside its own row, oldest first."""
        return self._take(self._job_events(job_id))

    async def job_events_async(self, job_id: int) -> list[dict[str, Any]]:
        """As `job_events`, without blocking the event loop."""
        return await self._take_async(self._job_events(job_id))

    def _job_events(self, job_id: int) -> Steps[list[dict[str, Any]]]:
        checked_id(job_id)
        return look(lambda connection: operations.list_events(connection, self.tables, job_id))

    # Jobs

    def list_jobs(
        self,
        *,
        status: str | None = None,
        queue: str | None = None,
        task: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        before_id: int | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """Jobs that fit the filters, newest first. `before_id` continues after a page.

        error_type: of the last failed attempt, such as "ValueError"; with its module, or without.
        since, until: when the job became final, or was enqueued if it is still open: an aware datetime, or how long
        ago (seconds or a timedelta).
        tags: keys of the metadata, and the strings they must hold.

        Completed ones of a queue or task that has few among millions take long to find: see `page_of_jobs`.
        """
        wanted = job_filter(status, queue, task, error_type, since, until, tags)
        return self._take(self._page_of_jobs(wanted, before_id, limit, None)).jobs

    async def list_jobs_async(
        self,
        *,
        status: str | None = None,
        queue: str | None = None,
        task: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        before_id: int | None = None,
        limit: int = 50,
    ) -> list[Job]:
        """As `list_jobs`, without blocking the event loop."""
        wanted = job_filter(status, queue, task, error_type, since, until, tags)
        return (await self._take_async(self._page_of_jobs(wanted, before_id, limit, None))).jobs

    def page_of_jobs(
        self,
        *,
        status: str | None = None,
        queue: str | None = None,
        task: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        before_id: int | None = None,
        limit: int = 50,
        within: int | None = 100_000,
    ) -> operations.JobPage:
        """The same, with the `before_id` of the next page; None when there is none.

        within: look through so many jobs at most, None: through all. When that ends the page early, `complete` is
        false. Pending, running, dead and cancelled jobs are found by an index, and are always complete.
        """
        wanted = job_filter(status, queue, task, error_type, since, until, tags)
        return self._take(self._page_of_jobs(wanted, before_id, limit, within))

    async def page_of_jobs_async(
        self,
        *,
        status: str | None = None,
        queue: str | None = None,
        task: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
        before_id: int | None = None,
        limit: int = 50,
        within: int | None = 100_000,
    ) -> operations.JobPage:
        """As `page_of_jobs`, without blocking the event loop."""
        wanted = job_filter(status, queue, task, error_type, since, until, tags)
        return await self._take_async(self._page_of_jobs(wanted, before_id, limit, within))

    def _page_of_jobs(
        self, wanted: JobFilter, before_id: int | None, limit: int, within: int | None
    ) -> Steps[operations.JobPage]:
        checked_limit(limit)
        if within is not None and (not isinstance(within, int) or isinstance(within, bool) or within < 1):
            raise ConfigurationError(f"within must be at least 1, or None, got {within!r}")
        return look(
            lambda connection: operations.list_jobs(
                connection, self.tables, wanted, before_id=before_id, limit=limit, within=within
            )
        )

    def iter_jobs(
        self,
        *,
        status: str | None = None,
        queue: str | None = None,
        task: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Iterator[Job]:
        """All jobs that fit the filters (see `list_jobs`), oldest first, read in pages of 500: no transaction stays
        open between two of them, and no more than one is held in memory."""
        return self._iter_jobs(job_filter(status, queue, task, error_type, since, until, tags))

    def iter_jobs_async(
        self,
        *,
        status: str | None = None,
        queue: str | None = None,
        task: str | None = None,
        error_type: str | None = None,
        since: datetime | timedelta | float | None = None,
        until: datetime | timedelta | float | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Job]:
        """As `iter_jobs`, for `async for`."""
        return self._iter_jobs_async(job_filter(status, queue, task, error_type, since, until, tags))

    def _iter_jobs(self, wanted: JobFilter) -> Iterator[Job]:
        after_id: int | None = 0
        while after_id is not None:
            page, after_id = self._take(self._jobs_after(wanted, after_id))
            yield from page

    async def _iter_jobs_async(self, wanted: JobFilter) -> AsyncIterator[Job]:
        after_id: int | None = 0
        while after_id is not None:
            page, after_id = await self._take_async(self._jobs_after(wanted, after_id))
            for job in page:
                yield job

    def _jobs_after(self, wanted: JobFilter, after_id: int) -> Steps[tuple[Sequence[Job], int | None]]:
        """A page of jobs, and the id after which the next one begins; None: it was the last."""
        page = yield from look(
            lambda connection: operations.jobs_after(
                connection, self.tables, wanted, after_id=after_id, limit=PAGE_JOBS
            )
        )
        return page, page[-1].id if len(page) == PAGE_JOBS else None

    # Queues and workers

    def queues(self, *, exact: bool = False) -> list[operations.QueueSummary]:
        """How many jobs of each queue stand where.

        In a table of more than some 30,000 jobs the completed and the cancelled ones are estimated, unless `exact`,
        which reads the whole table.
        """
        return self._take(self._queues(exact))

    async def queues_async(self, *, exact: bool = False) -> list[operations.QueueSummary]:
        """As `queues`, without blocking the event loop."""
        return await self._take_async(self._queues(exact))

    def _queues(self, exact: bool) -> Steps[list[operations.QueueSummary]]:
        return look(lambda connection: operations.summarize_queues(connection, self.tables, exact=exact))

    def workers(self) -> list[dict[str, Any]]:
        """The workers that are, or lately were, alive."""
        return self._take(self._workers())

    async def workers_async(self) -> list[dict[str, Any]]:
        """As `workers`, without blocking the event loop."""
        return await self._take_async(self._workers())

    def _workers(self) -> Steps[list[dict[str, Any]]]:
        return look(lambda connection: operations.list_workers(connection, self.tables))

    # Results

    def result(self, job_id: int, *, timeout: float | timedelta | None = None) -> Any:
        """Wait until a job has ended, and return what its task returned: as `JobHandle.result`, for an id from
        elsewhere."""
        return wait(self, Waiting([job_id], timeout))[0]

    async def result_async(self, job_id: int, *, timeout: float | timedelta | None = None) -> Any:
        """As `result`, without blocking the event loop."""
        return (await wait_async(self, Waiting([job_id], timeout)))[0]

    def results(
        self,
        job_ids: Iterable[int | JobHandle],
        *,
        timeout: float | timedelta | None = None,
        return_errors: bool = False,
    ) -> list[Any]:
        """Wait until all these jobs have ended; their results, in the order of the ids.

        All are looked at with one statement. The first that is found dead, cancelled or missing raises its error, as
        `result` does; with `return_errors` the error takes the place of the result.
        """
        return wait(self, Waiting(job_ids, timeout, return_errors=return_errors))

    async def results_async(
        self,
        job_ids: Iterable[int | JobHandle],
        *,
        timeout: float | timedelta | None = None,
        return_errors: bool = False,
    ) -> list[Any]:
        """As `results`, without blocking the event loop."""
        return await wait_async(self, Waiting(job_ids, timeout, return_errors=return_errors))


def job_filter(
    status: str | None,
    queue: str | None,
    task: str | None,
    error_type: str | None,
    since: datetime | timedelta | float | None,
    until: datetime | timedelta | float | None,
    tags: Mapping[str, str] | None,
) -> JobFilter:
    if status is not None and status not in tuple(JobStatus):
        raise ConfigurationError(f"status must be one of {', '.join(JobStatus)}, got {status!r}")
    for name, value in (("queue", queue), ("task", task), ("error_type", error_type)):
        checked_text(name, value)
    if tags is not None:
        if not isinstance(tags, Mapping):
            raise ConfigurationError(f"tags must be a mapping of metadata keys to strings, got {type(tags).__name__}")
        for key, value in tags.items():
            checked_text("a key of tags", key, is_optional=False)
            checked_text(f"the tag {key!r}", value, is_optional=False)
    after, before = checked_moment("since", since), checked_moment("until", until)
    if (isinstance(after, datetime) and isinstance(before, datetime) and after >= before) or (
        isinstance(after, float) and isinstance(before, float) and after <= before
    ):
        ago = " ago" if isinstance(after, float) else ""
        raise ConfigurationError(
            f"since must be earlier than until, or no job fits; got since {since}{ago} until {until}{ago}"
        )
    return JobFilter(status, queue, task, error_type, after, before, tags)
