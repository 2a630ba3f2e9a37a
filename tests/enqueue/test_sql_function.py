"""The SQL function `enqueue`, for triggers and other languages: the same job as an enqueue from Python."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from jobs import add_one, claim_one, completed, external, finish, retried, statuses
from sqlalchemy import exc
from support import execute, rows, scalar, wait_for

from pgqueue import PgQueue, Unique, migration
from pgqueue.engine import make_engine


def call(pg: PgQueue, arguments: str, **parameters: Any) -> int:
    job_id: int = scalar(pg.engine, f"SELECT pgqueue.enqueue({arguments})", **parameters)
    return job_id


def test_the_defaults_are_those_of_an_enqueue_from_python(pg: PgQueue) -> None:
    from_python = add_one(pg)

    from_sql = call(pg, "'work', '{\"n\": 0}'")

    one, other = vars(pg.get_job(from_python)), vars(pg.get_job(from_sql))
    for different in ("id", "run_at", "created_at"):
        del one[different], other[different]
    assert one == other


def test_every_argument_is_stored(pg: PgQueue) -> None:
    job_id = call(
        pg,
        "task => 'work', payload => '{\"n\": 1}', queue => 'mail', priority => 7, run_at => '2040-01-01 00:00+00',"
        " unique_key => 'k', max_retries => 9, metadata => '{\"trace\": \"t\"}'",
    )

    job = pg.get_job(job_id)
    assert (job.task, job.payload, job.queue, job.priority) == ("work", {"n": 1}, "mail", 7)
    assert (job.run_at.isoformat(), job.unique_key, job.max_retries) == ("2040-01-01T00:00:00+00:00", "k", 9)
    assert job.metadata == {"trace": "t"}


def test_every_option_of_python_is_there(pg: PgQueue) -> None:
    options = {"concurrency_key": "c", "ordering_key": "o", "rate_key": "r", "unique_key": "u"}
    at = datetime(2040, 1, 1, tzinfo=UTC)
    from_python = add_one(pg, task="one", at=at, expires_in=60, **options)

    from_sql = call(
        pg,
        "'two', '{\"n\": 0}', run_at => '2040-01-01 00:00+00', expires_in => '60 s', unique_key => 'u',"
        " concurrency_key => 'c', ordering_key => 'o', rate_key => 'r'",
    )

    one, other = vars(pg.get_job(from_python)), vars(pg.get_job(from_sql))
    for different in ("id", "task", "created_at"):
        del one[different], other[different]
    assert one == other
    moment = call(pg, "'work', expires_at => '2041-01-01 00:00+00'")
    assert pg.get_job(moment).expires_at == datetime(2041, 1, 1, tzinfo=UTC)


def test_an_ordering_key_alone_makes_the_queue_keep_it(pg: PgQueue) -> None:
    first = call(pg, "'work', ordering_key => 'o'")
    call(pg, "'work', ordering_key => 'o'")

    assert [job.id for job in pg.claim("me", limit=5)] == [first]


def test_a_taken_unique_key_is_an_error_where_that_is_asked_for(pg: PgQueue) -> None:
    first = call(pg, "'work', unique_key => 'k', on_conflict => 'raise'")

    with pytest.raises(exc.IntegrityError, match=f"task work has the pending job {first} with the unique key 'k'"):
        call(pg, "'work', unique_key => 'k', on_conflict => 'raise'")


def test_a_pending_job_is_replaced_where_that_is_asked_for(pg: PgQueue) -> None:
    replace = "'work', '{\"n\": 2}', unique_key => 'k', on_conflict => 'replace'"
    first = add_one(pg, unique_key="k", priority=1, max_retries=3)
    finish(pg, retried(claim_one(pg)))

    assert call(pg, f"{replace}, priority => 7, metadata => '{{\"a\": \"b\"}}', queue => 'mail'") == first

    job = pg.get_job(first)
    assert (job.payload, job.priority, job.metadata, job.queue, job.retries) == ({"n": 2}, 7, {"a": "b"}, "mail", 0)
    assert [event["event"] for event in pg.job_events(first)] == ["retry", "replace"]
    assert pg.job_events(first)[1]["actor"].startswith("sql:")
    claim_one(pg, queue="mail")
    with pytest.raises(exc.IntegrityError, match="the running job"):
        call(pg, replace)


def test_a_period_is_kept_like_one_of_python(pg: PgQueue) -> None:
    periodic = pg.task(name="work", unique=Unique(period=3600))(lambda: None)
    again = "'work', unique_key => 'k', unique_for => '1 hour'"
    first = call(pg, again)
    finish(pg, completed(claim_one(pg)))

    with pg.begin() as connection:
        from_python = periodic.using(unique_key="k").enqueue(connection)
    assert (call(pg, again), from_python.id, from_python.inserted) == (first, first, False)
    with pytest.raises(exc.IntegrityError, match="the completed job"):
        call(pg, f"{again}, on_conflict => 'raise'")
    execute(pg.engine, "UPDATE pgqueue.unique_periods SET until = now()")
    second = call(pg, again)
    assert second != first
    pg.cancel(second)
    assert call(pg, again) not in (first, second)


def test_a_period_that_another_call_took_meanwhile_takes_the_new_job_back(pg: PgQueue) -> None:
    """It began after this call had looked, and its job has ended already."""
    results: list[int] = []
    again = "'work', unique_key => 'k', unique_for => '1 hour'"
    with pg.engine.connect() as rival:
        his = rival.scalar(sa.text(f"SELECT pgqueue.enqueue({again})"))
        rival.execute(sa.text("UPDATE pgqueue.jobs SET status = 'completed', finished_at = now()"))
        caller = threading.Thread(target=lambda: results.append(call(pg, again)))
        caller.start()
        wait_for(
            lambda: scalar(pg.engine, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"),
            "the caller to wait for the rival",
        )
        rival.commit()
        caller.join()

    assert results == [his]
    assert list(statuses(pg)) == [his]


@pytest.mark.parametrize("on_full", ["error", "block", "drop"])
def test_a_full_queue_takes_no_more(pg: PgQueue, on_full: str) -> None:
    pg.set_limits(queue="default", max_depth=2, on_full=on_full)
    for _ in range(2):
        assert call(pg, "'work'")
    call(pg, "'work', queue => 'other'")

    if on_full == "drop":
        assert call(pg, "'work'") is None
    else:
        with pytest.raises(exc.DBAPIError, match="queue default is full: its max_depth is 2"):
            call(pg, "'work'")
    assert len(statuses(pg)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("on_conflict => 'ignore'", "on_conflict must be skip, raise or replace, got 'ignore'"),
        ("on_conflict => NULL", "got NULL"),
        ("unique_for => '1 hour'", "unique_for must be more than 0, and needs a unique_key"),
        ("unique_key => 'k', unique_for => '-1 s'", "unique_for must be more than 0"),
        ("expires_in => '1 s', expires_at => '2040-01-01'", "give either expires_in or expires_at"),
        ("expires_in => '0 s'", "would expire before it is due"),
        ("expires_at => '2020-01-01'", "would expire before it is due"),
        ("run_at => '2040-01-02', expires_at => '2040-01-01'", "would expire before it is due"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(pg: PgQueue, arguments: str, message: str) -> None:
    with pytest.raises(exc.DBAPIError, match=message) as caught:
        call(pg, f"'work', {arguments}")

    assert getattr(caught.value.orig, "sqlstate", None) == "22023"
    assert statuses(pg) == {}


@pytest.mark.parametrize("number", ["5", "5::smallint", "5::bigint::integer", "(SELECT 5)"])
def test_a_priority_needs_no_cast(pg: PgQueue, number: str) -> None:
    job_id = call(pg, f"'work', priority => {number}, max_retries => {number}")

    job = pg.get_job(job_id)
    assert (job.priority, job.max_retries) == (5, 5)


def test_a_job_enqueued_by_sql_is_claimed_like_any_other(pg: PgQueue) -> None:
    job_id = call(pg, "'work', '{\"n\": 1}'")

    job = claim_one(pg)

    assert (job.id, job.payload) == (job_id, {"n": 1})


def test_it_is_part_of_the_callers_transaction(pg: PgQueue) -> None:
    with pg.engine.connect() as connection:
        connection.execute(sa.text("SELECT pgqueue.enqueue('work')"))
        connection.rollback()

    assert statuses(pg) == {}


def test_a_taken_unique_key_gives_the_id_of_the_job_that_has_it(pg: PgQueue) -> None:
    first = call(pg, "'work', unique_key => 'k'")

    assert call(pg, "'work', '{\"n\": 2}', unique_key => 'k'") == first
    assert add_one(pg, unique_key="k") == first
    assert call(pg, "'other', unique_key => 'k'") != first
    assert pg.get_job(first).payload == {}


def test_a_running_job_keeps_its_unique_key_and_a_final_one_does_not(pg: PgQueue) -> None:
    first = call(pg, "'work', unique_key => 'k'")
    job = claim_one(pg)

    assert call(pg, "'work', unique_key => 'k'") == first
    finish(pg, completed(job))
    assert call(pg, "'work', unique_key => 'k'") != first


@pytest.mark.parametrize("rival_commits", [True, False])
def test_with_a_rival_for_the_unique_key_it_waits_for_his_transaction(pg: PgQueue, rival_commits: bool) -> None:
    results: list[int] = []
    with pg.engine.connect() as rival:
        his = rival.scalar(sa.text("SELECT pgqueue.enqueue('work', unique_key => 'k')"))
        caller = threading.Thread(target=lambda: results.append(call(pg, "'work', unique_key => 'k'")))
        caller.start()
        wait_for(
            lambda: scalar(pg.engine, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"),
            "the caller to wait for the rival",
        )
        if rival_commits:
            rival.commit()
        else:
            rival.rollback()
        caller.join()

    assert (results[0] == his) == rival_commits
    assert list(statuses(pg)) == results


REFUSED = [
    ("NULL", "task name must be 1 to 128 letters, digits or any of _ . : - and not start with a sign, got NULL"),
    ("''", "task name must be 1 to 128 letters"),
    ("repeat('x', 129)", "task name must be 1 to 128 letters"),
    ("'a b'", "task name must be 1 to 128 letters, digits or any of _ . : - and not start with a sign, got a b"),
    ("'work', queue => NULL", "queue name must be 1 to 128 letters"),
    ("'work', queue => ''", "queue name must be 1 to 128 letters"),
    ("'work', queue => '-mail'", "queue name must be 1 to 128 letters"),
    ("'work', queue => E'mail\\n'", "queue name must be 1 to 128 letters"),
    ("'work', queue => repeat('x', 129)", "queue name must be 1 to 128 letters"),
    ("'work', NULL", "payload must be a JSON object, got NULL"),
    ("'work', '[]'", "payload must be a JSON object, got array"),
    ("'work', '\"text\"'", "payload must be a JSON object, got string"),
    ("'work', 'null'", "payload must be a JSON object, got null"),
    ("'work', metadata => NULL", "metadata must be a JSON object, got NULL"),
    ("'work', metadata => '[]'", "metadata must be a JSON object, got array"),
    ("'work', unique_key => ''", "unique_key must have 1 to 512 characters, got 0"),
    ("'work', unique_key => repeat('x', 513)", "unique_key must have 1 to 512 characters, got 513"),
    ("'work', concurrency_key => ''", "concurrency_key must have 1 to 512"),
    ("'work', ordering_key => ''", "ordering_key must have 1 to 512"),
    ("'work', rate_key => repeat('x', 513)", "rate_key must have 1 to 512"),
    ("'work', run_at => NULL", "run_at must lie between the years 1970 and 9000, got NULL"),
    ("'work', run_at => 'infinity'", "run_at must lie between the years 1970 and 9000, got infinity"),
    ("'work', run_at => '-infinity'", "run_at must lie between the years"),
    ("'work', run_at => '0044-03-15 BC'", "run_at must lie between the years"),
    ("'work', run_at => '12000-01-01'", "run_at must lie between the years"),
    ("'work', expires_at => 'infinity'", "expires_at must lie between the years"),
    ("'work', expires_in => '9999 years'", "the job would expire after the year 9000"),
    ("'work', max_retries => -1", "max_retries must be between 0 and 32767, got -1"),
    ("'work', max_retries => 40000", "max_retries must be between 0 and 32767, got 40000"),
    ("'work', max_retries => NULL", "max_retries must be between 0 and 32767, got NULL"),
    ("'work', priority => 40000", "priority must be between -32768 and 32767, got 40000"),
    ("'work', priority => NULL", "priority must be between -32768 and 32767, got NULL"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_an_enqueue_from_python_refuses_is_refused_here(pg: PgQueue, arguments: str, message: str) -> None:
    with pytest.raises(exc.DBAPIError) as caught:
        call(pg, arguments)

    assert getattr(caught.value.orig, "sqlstate", None) == "22023"
    assert f"pgqueue: {message}" in str(caught.value.orig)
    assert statuses(pg) == {}


def test_a_payload_that_is_no_json_is_refused(pg: PgQueue) -> None:
    with pytest.raises(exc.DBAPIError, match="invalid input syntax for type json"):
        call(pg, "'work', '{'")

    assert statuses(pg) == {}


@pytest.mark.parametrize("period", ["", ", unique_for => '1 hour'"])
def test_a_full_queue_still_knows_the_jobs_it_has(pg: PgQueue, period: str) -> None:
    pg.set_limits(queue="default", max_depth=1)
    held = call(pg, f"'work', unique_key => 'k'{period}")

    assert call(pg, f"'work', unique_key => 'k'{period}") == held
    assert call(pg, f"'work', unique_key => 'k', priority => 7, on_conflict => 'replace'{period}") == held
    with pytest.raises(exc.DBAPIError, match="is full"):
        call(pg, f"'work', unique_key => 'other'{period}")


def test_a_trigger_of_the_application_enqueues_in_the_same_transaction(pg: PgQueue) -> None:
    with pg.begin() as connection:
        connection.execute(sa.text("CREATE TABLE orders (id integer PRIMARY KEY)"))
        connection.execute(
            sa.text(
                "CREATE FUNCTION order_placed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                " PERFORM pgqueue.enqueue('send_receipt', jsonb_build_object('order_id', NEW.id));"
                " RETURN NEW; END $$"
            )
        )
        connection.execute(
            sa.text("CREATE TRIGGER placed AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION order_placed()")
        )

    execute(pg.engine, "INSERT INTO orders VALUES (1), (2)")
    with pg.engine.connect() as connection:
        connection.execute(sa.text("INSERT INTO orders VALUES (3)"))
        connection.rollback()

    assert sorted(job.payload["order_id"] for job in pg.list_jobs(task="send_receipt")) == [1, 2]


def test_a_hostile_search_path_changes_nothing(pg: PgQueue) -> None:
    """Tables, functions and operators of the same names, in front of the right ones."""
    with pg.begin() as connection:
        for statement in (
            "CREATE SCHEMA hostile",
            "CREATE TABLE hostile.jobs (LIKE pgqueue.jobs)",
            "CREATE FUNCTION hostile.now() RETURNS timestamptz LANGUAGE sql AS $$ SELECT 'epoch'::timestamptz $$",
            "CREATE FUNCTION hostile.isfinite(timestamptz) RETURNS boolean LANGUAGE sql AS $$ SELECT true $$",
            "CREATE FUNCTION hostile.texteq(text, text) RETURNS boolean LANGUAGE sql AS $$ SELECT true $$",
            "CREATE OPERATOR hostile.= (LEFTARG = text, RIGHTARG = text, FUNCTION = hostile.texteq)",
        ):
            connection.execute(sa.text(statement))
    call(pg, "'work', unique_key => 'a'")

    with pg.engine.begin() as connection:
        connection.execute(sa.text("SET LOCAL search_path = hostile, pg_catalog"))
        connection.execute(sa.text("CREATE TEMPORARY TABLE jobs (LIKE pgqueue.jobs) ON COMMIT DROP"))
        first = connection.scalar(sa.text("SELECT pgqueue.enqueue('work', unique_key => 'b')"))
        second = connection.scalar(sa.text("SELECT pgqueue.enqueue('work', unique_key => 'b')"))

    assert first == second
    assert rows(pg.engine, "SELECT unique_key, run_at > now() - interval '1 hour' FROM pgqueue.jobs ORDER BY id") == [
        ("a", True),
        ("b", True),
    ]
    assert scalar(pg.engine, "SELECT count(*) FROM hostile.jobs") == 0


def test_arguments_are_data_and_never_sql(pg: PgQueue) -> None:
    hostile = "'; DROP TABLE pgqueue.jobs; --"

    arguments = "'work', jsonb_build_object(CAST(:text AS text), 1), unique_key => :text, ordering_key => :text"
    job_id = call(pg, arguments, text=hostile)

    job = pg.get_job(job_id)
    assert (job.payload, job.unique_key, job.ordering_key) == ({hostile: 1}, hostile, hostile)
    for name in (":text", "'work', queue => :text"):
        with pytest.raises(exc.DBAPIError, match="name must be 1 to 128 letters"):
            call(pg, name, text=hostile)


def test_it_stores_into_the_schema_it_was_made_in(empty_pg_url: str) -> None:
    for schema in ("one", "two"):
        engine = make_engine(empty_pg_url)
        migration.upgrade(engine, schema)
        engine.dispose()
    pg = PgQueue(empty_pg_url, schema="two")

    job_id = scalar(pg.engine, "SELECT two.enqueue('work')")

    assert statuses(pg) == {job_id: "pending"}
    assert scalar(pg.engine, "SELECT count(*) FROM one.jobs") == 0
    pg.dispose()


def test_it_has_only_the_rights_of_its_caller(pg: PgQueue) -> None:
    with pg.begin() as connection:
        connection.execute(sa.text("CREATE ROLE stranger"))
        connection.execute(sa.text("GRANT USAGE ON SCHEMA pgqueue TO stranger"))
    try:
        with pg.engine.begin() as connection:
            connection.execute(sa.text("SET LOCAL ROLE stranger"))
            with pytest.raises(exc.ProgrammingError, match="permission denied"):
                connection.execute(sa.text("SELECT pgqueue.enqueue('work')"))
    finally:
        execute(pg.engine, "DROP OWNED BY stranger")
        execute(pg.engine, "DROP ROLE stranger")

    assert statuses(pg) == {}


def test_a_task_registered_in_python_takes_what_sql_sends(pg: PgQueue) -> None:
    external(pg, "other")
    call(pg, "'work', jsonb_build_object('at', now(), 'n', 1.50, 'none', NULL)")

    payload = claim_one(pg).payload

    assert (payload["n"], payload["none"], type(payload["at"])) == (1.5, None, str)
