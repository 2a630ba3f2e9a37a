"""Looking at jobs, queues and workers, and waiting for results: nothing here changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

from pgqueue import operations
from pgqueue.arguments import checked_limit, checked_moment, checked_text
from pgqueue.errors import ConfigurationError
from pgqueue.handle import JobHandle, Waiting, wait, wait_async
from pgqueue.job import Job, JobStatus
from pgqueue.operations import JobFilter
from pgqueue.registry import Registry

#: Jobs that one page has.
PAGE_JOBS = 500


class Inspector(Registry):
    """Calls that only look."""

    def get_job(self, job_id: int) -> Job:
        """The job as it stands. Raises JobNotFound."""
        with self.reading() as connection:
            return operations.get_job(connection, self.tables, job_id)

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
        page = self.page_of_jobs(
            status=status,
            queue=queue,
            task=task,
            error_type=error_type,
            since=since,
            until=until,
            tags=tags,
            before_id=before_id,
            limit=limit,
            within=None,
        )
        return page.jobs

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
        checked_limit(limit)
        if within is not None and (not isinstance(within, int) or isinstance(within, bool) or within < 1):
            raise ConfigurationError(f"within must be at least 1, or None, got {within!r}")
        with self.reading() as connection:
            return operations.list_jobs(
                connection, self.tables, wanted, before_id=before_id, limit=limit, within=within
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
        wanted = job_filter(status, queue, task, error_type, since, until, tags)
        return self._iter_jobs(wanted)

    def _iter_jobs(self, wanted: JobFilter) -> Iterator[Job]:
        after_id = 0
        while True:
            with self.reading() as connection:
                page = operations.jobs_after(connection, self.tables, wanted, after_id=after_id, limit=PAGE_JOBS)
            yield from page
            if len(page) < PAGE_JOBS:
                return
            after_id = page[-1].id

    def job_events(self, job_id: int) -> list[dict[str, Any]]:
        """What was recorded of a job beside its own row, oldest first."""
        with self.reading() as connection:
            return operations.list_events(connection, self.tables, job_id)

    def queues(self, *, exact: bool = False) -> list[operations.QueueSummary]:
        """How many jobs of each queue stand where.

        In a table of more than some 30,000 jobs the completed and the cancelled ones are estimated, unless `exact`,
        which reads the whole table.
        """
        with self.reading() as connection:
            return operations.summarize_queues(connection, self.tables, exact=exact)

    def workers(self) -> list[dict[str, Any]]:
        """The workers that are, or lately were, alive."""
        with self.reading() as connection:
            return operations.list_workers(connection, self.tables)

    # Results

    def result(self, job_id: int, *, timeout: float | timedelta | None = None) -> Any:
        """Wait until a job has ended, and return what its task returned: as `JobHandle.result`, for an id from
        elsewhere."""
        return wait(self, Waiting([job_id], timeout))[0]

    async def result_async(self, job_id: int, *, timeout: float | timedelta | None = None) -> Any:
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
    return JobFilter(
        status, queue, task, error_type, checked_moment("since", since), checked_moment("until", until), tags
    )
