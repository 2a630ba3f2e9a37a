"""Every difference between PostgreSQL and SQLite: types, the clock, sets of rows, the order of a claim.

PostgreSQL is the product; SQLite runs the same statements for development and tests on one host.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import psycopg
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from pgqueue.errors import ConfigurationError

POSTGRESQL = "postgresql"
SQLITE = "sqlite"

#: `->`, RETURNING and UPDATE … FROM are all there from this version on.
SQLITE_VERSION_MIN = (3, 38, 0)

#: SQLite keeps a moment as text that sorts like the moment: UTC, milliseconds.
_SQLITE_NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now')"


def checked_dialect(name: str) -> str:
    if name in (POSTGRESQL, SQLITE):
        return name
    raise ConfigurationError(f"pgqueue works on PostgreSQL and SQLite, got a {name!r} database")


# Types -----------------------------------------------------------------------------------------------------


class UTCDateTime(sa.types.TypeDecorator[datetime]):
    """timestamptz; on SQLite text in UTC. Takes and gives aware datetimes only."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == SQLITE:
            return dialect.type_descriptor(sa.Text())
        return dialect.type_descriptor(sa.DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> Any:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"expected a datetime that says its time zone, got the naive {value!r}")
        if value is None or dialect.name != SQLITE:
            return value
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if dialect.name == SQLITE:
            # Rows also come from plain SQL, where datetime('now') has no milliseconds.
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
        moment: datetime = value
        return moment


#: bigint; SQLite numbers rows by itself only in a column declared INTEGER.
BigId = sa.BigInteger().with_variant(sa.Integer(), SQLITE)

JSONDocument = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), POSTGRESQL)


class TextArray(sa.types.TypeDecorator[list[str]]):
    """A list of strings as one parameter, for `text_in`."""

    impl = sa.Text()
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == POSTGRESQL:
            return dialect.type_descriptor(postgresql.ARRAY(sa.Text()))
        return dialect.type_descriptor(sa.Text())

    def process_bind_param(self, value: list[str] | None, dialect: sa.Dialect) -> Any:
        return value if dialect.name == POSTGRESQL else json.dumps(value)


class IdArray(sa.types.TypeDecorator[list[int]]):
    """A list of ids as one parameter, for `id_among`. As text: to adapt each number takes the driver longer."""

    impl = sa.Text()
    cache_ok = True

    def process_bind_param(self, value: list[int] | None, dialect: sa.Dialect) -> Any:
        text = ",".join(map(str, value or ()))
        return f"{{{text}}}" if dialect.name == POSTGRESQL else f"[{text}]"


# Expressions -----------------------------------------------------------------------------------------------


T = TypeVar("T")


class _template(FunctionElement[T]):
    """An expression that each database has its own text for, in which `{0}` and `{1}` stand for the arguments."""

    postgresql: str
    sqlite: str


@compiles(_template, POSTGRESQL)
def _(element: _template[Any], compiler: SQLCompiler, **kw: Any) -> str:
    return element.postgresql.format(*(compiler.process(clause, **kw) for clause in element.clauses))


@compiles(_template, SQLITE)
def _(element: _template[Any], compiler: SQLCompiler, **kw: Any) -> str:
    return element.sqlite.format(*(compiler.process(clause, **kw) for clause in element.clauses))


class now(_template[datetime]):
    """The database's clock. On PostgreSQL the start of the transaction: stable, so that distributed engines
    accept it in an UPDATE."""

    type = UTCDateTime()
    inherit_cache = True
    postgresql = "now()"
    sqlite = _SQLITE_NOW


class statement_now(_template[datetime]):
    """Likewise, the start of the statement: for what ends a transaction in which users' code ran. Stable as well."""

    type = UTCDateTime()
    inherit_cache = True
    postgresql = "statement_timestamp()"
    sqlite = _SQLITE_NOW


class seconds_from_now(_template[datetime]):
    """The database's clock plus a number of seconds (an expression; may be negative)."""

    type = UTCDateTime()
    inherit_cache = True
    postgresql = "now() + make_interval(secs => CAST({0} AS double precision))"
    sqlite = "strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', {0}))"


class seconds_since(_template[float]):
    """Seconds from a moment (an expression) to the database's now."""

    type = sa.Float()
    inherit_cache = True
    postgresql = "CAST(extract(epoch FROM now() - {0}) AS double precision)"
    sqlite = "((julianday('now') - julianday({0})) * 86400.0)"


class microseconds(_template[int]):
    """Microseconds from 1970 until a moment (an expression): psycopg takes ten times as long for a timestamp."""

    type = sa.BigInteger()
    inherit_cache = True
    postgresql = "CAST(date_part('epoch', {0}) * 1000000 AS bigint)"
    sqlite = "(strftime('%s', {0}) * 1000000 + substr(strftime('%f', {0}), 4) * 1000)"


class seconds_before(_template[datetime]):
    """A moment (an expression), so many seconds (another) earlier."""

    type = UTCDateTime()
    inherit_cache = True
    postgresql = "{0} - make_interval(secs => CAST({1} AS double precision))"
    sqlite = "strftime('%Y-%m-%d %H:%M:%f', {0}, printf('%+.3f seconds', -({1})))"


class json_of(_template[Any]):
    """JSON text (an expression) as a value for a JSON column."""

    type = JSONDocument
    inherit_cache = True
    postgresql = "CAST({0} AS jsonb)"
    sqlite = "{0}"


class json_text(_template[str]):
    """`json_text(column, key)`: the value at a key of a JSON object as text; NULL where there is no such object."""

    type = sa.Text()
    inherit_cache = True
    postgresql = "({0} ->> {1})"
    sqlite = "CASE WHEN json_valid({0}) THEN CAST({0} ->> {1} AS TEXT) END"


class stamped(_template[Any]):
    """A JSON object as text (an expression), for a JSON column, with the database's now as its `at`."""

    type = JSONDocument
    inherit_cache = True
    postgresql = "(CAST({0} AS jsonb) || jsonb_build_object('at', now()))"
    sqlite = "json_set({0}, '$.at', strftime('%Y-%m-%dT%H:%M:%f+00:00', 'now'))"


class _condition(_template[bool]):
    """Something that is true or false."""

    type = sa.Boolean()

    def self_group(self, against: Any = None) -> Any:
        """As it is: for SQLite, which has no booleans, `= 1` would be put behind it, and no index be used."""
        return self


class no_earlier(_condition):
    """`no_earlier(column, moment)`: whether the column's moment is the other, or later. On SQLite to the second: what
    plain SQL writes there may have no milliseconds, and comes before what has."""

    inherit_cache = True
    postgresql = "{0} >= {1}"
    sqlite = "{0} >= substr({1}, 1, 19)"


class id_in(_condition):
    """`id_in(column, select.scalar_subquery())`: the column is one of the selected ids.

    On PostgreSQL `= ANY(ARRAY(SELECT …))`: the subquery runs exactly once and the update goes by primary key.
    With `IN (SELECT … LIMIT n)` the planner may run the subquery again for each row and take more than n.
    """

    inherit_cache = True
    postgresql = "{0} = ANY (ARRAY{1})"
    sqlite = "{0} IN {1}"


class text_in(_condition):
    """`text_in(column, bindparam(…, type_=TextArray()))`: the column is one of a list of strings."""

    inherit_cache = True
    postgresql = "{0} = ANY ({1})"
    sqlite = "{0} IN (SELECT value FROM json_each({1}))"


class id_among(_condition):
    """`id_among(column, bindparam(…, type_=IdArray()))`: the column is one of a list of ids.

    On PostgreSQL the rows are found, and so locked, in the order of their ids.
    """

    inherit_cache = True
    postgresql = "{0} = ANY (CAST({1} AS bigint[]))"
    sqlite = text_in.sqlite


# Sets of rows as one parameter -----------------------------------------------------------------------------


def rows(dialect_name: str, parameter: str, *columns: sa.ColumnClause[Any]) -> sa.FromClause:
    """A JSON array of objects, given as one text parameter, as a table with these columns."""
    if dialect_name == POSTGRESQL:
        documents = sa.cast(sa.bindparam(parameter, type_=sa.Text()), postgresql.JSON())
        return (
            sa.func.json_to_recordset(documents)
            .table_valued(*columns, name="r")
            .render_derived(name="r", with_types=True)
        )
    each = sa.func.json_each(sa.bindparam(parameter, type_=sa.Text())).table_valued("value", name="e")
    return sa.select(
        *(
            sa.type_coerce(sa.func.json_extract(each.c.value, f"$.{column.name}"), column.type).label(column.name)
            for column in columns
        )
    ).subquery("r")


def documents(dialect_name: str, parameter: str) -> tuple[sa.FromClause, sa.ColumnElement[Any], Any]:
    """A JSON array of objects as a table: the table, the column with each object, the column to order by."""
    text = sa.bindparam(parameter, type_=sa.Text())
    if dialect_name == POSTGRESQL:
        each: sa.TableValuedAlias = (
            sa.func.json_array_elements(sa.cast(text, postgresql.JSON()))
            .table_valued("document", with_ordinality="n", name="d")
            .render_derived(name="d")
        )
        return each, sa.cast(each.c.document, postgresql.JSONB()), each.c.n
    each = sa.func.json_each(text).table_valued("key", "value", name="d")
    return each, sa.type_coerce(each.c.value, JSONDocument), each.c.key


def first_position(dialect_name: str) -> int:
    """What `documents` counts from."""
    return 1 if dialect_name == POSTGRESQL else 0


def writes_at_once(dialect_name: str) -> bool:
    """Whether several transactions write at the same time, and may wait for each other's rows."""
    return dialect_name == POSTGRESQL


def object_of(dialect_name: str, key: sa.ColumnElement[str], value: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
    """A JSON object of all rows, as text."""
    if dialect_name == POSTGRESQL:
        return sa.cast(sa.func.json_object_agg(key, value), sa.Text)
    return sa.func.json_group_object(key, value, type_=sa.Text())


# Statements ------------------------------------------------------------------------------------------------

#: In the `info` of a connection while its statements go straight to the driver.
STRAIGHT = "pgqueue_straight"

#: Likewise, where the server keeps such statements: the names under which it does, by their text.
PREPARED = "pgqueue_prepared"


def execute(connection: sa.Connection, statement: sa.Executable, parameters: Mapping[str, Any]) -> Sequence[Any]:
    """The rows of a statement that is kept: with psycopg as text, which takes half the client's time.

    Their values are as the driver gives them. All at once, because SQLAlchemy takes four times as long to give them one
    by one. Within `engine.straight` they are plain tuples; anywhere else their values have names, too.
    """
    if STRAIGHT in connection.info:
        return _execute_straight(connection, statement, parameters)
    if connection.dialect.driver != "psycopg":
        result = connection.execute(statement, parameters)
    else:
        compiled = _compiled(statement, "pyformat")
        result = connection.exec_driver_sql(compiled.text, compiled.encoded(parameters))
    return result.all() if result.returns_rows else ()


def _execute_straight(
    connection: sa.Connection, statement: sa.Executable, parameters: Mapping[str, Any]
) -> Sequence[tuple[Any, ...]]:
    """Have it executed past SQLAlchemy, and raise what SQLAlchemy would."""
    from pgqueue import libpq  # only now, because psycopg need not be complete for SQLite

    compiled = _compiled(statement, "numeric_dollar")
    driver: Any = connection.connection.driver_connection
    errors: Any = connection.dialect.loaded_dbapi.Error
    encoded = compiled.encoded(parameters)
    try:
        values = [encoded[name] for name in compiled.names]
        return libpq.execute(driver, compiled.text, values, connection.info.get(PREPARED))
    except errors as error:
        raise sa.exc.DBAPIError.instance(
            compiled.text,
            encoded,
            error,
            errors,
            hide_parameters=True,
            connection_invalidated=connection.dialect.is_disconnect(error, driver, None),
            dialect=connection.dialect,
        ) from error


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A statement as text for psycopg."""

    text: str
    names: Sequence[str]  #: of its parameters, by position where the text has positions
    constants: Mapping[str, Any]  #: the values that it brings along
    decorated: Mapping[str, sa.types.TypeDecorator[Any]]  #: the types of parameters that change their values
    dialect: sa.Dialect

    def encoded(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """All values, as the driver takes them."""
        encoded = {**self.constants, **parameters}
        for name, decorated in self.decorated.items():
            encoded[name] = decorated.process_bind_param(encoded[name], self.dialect)
        return encoded


@cache
def _compiled(statement: Any, paramstyle: str) -> _Compiled:
    dialect: sa.Dialect = psycopg.dialect(paramstyle=paramstyle)  # type: ignore[no-untyped-call]
    compiled = statement.compile(dialect=dialect)
    return _Compiled(
        compiled.string,
        compiled.positiontup or (),
        {name: bind.effective_value for name, bind in compiled.binds.items() if not bind.required},
        {name: bind.type for name, bind in compiled.binds.items() if isinstance(bind.type, sa.types.TypeDecorator)},
        dialect,
    )


def quoted(table: sa.Table, *, with_schema: bool = True) -> str:
    """How text for either database names a table: SQLite quotes as PostgreSQL does."""
    preparer = postgresql.dialect().identifier_preparer  # type: ignore[no-untyped-call]
    return preparer.format_table(table, use_schema=with_schema)


def insert(dialect_name: str, table: sa.Table) -> Any:
    """An INSERT that knows ON CONFLICT."""
    return postgresql.insert(table) if dialect_name == POSTGRESQL else sqlite.insert(table)


def with_settings(dialect_name: str, **settings: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """A condition that always holds; the server then has these settings until the transaction ends. Not for SQLite.

    synchronous_commit: off, and the commit returns before it is on disk. idle_in_transaction_session_timeout: the
    server ends the transaction when nothing is heard of it for so many milliseconds. lock_timeout: no statement, this
    one included, waits for a lock for longer.
    """
    if dialect_name == SQLITE or not settings:
        return sa.true()
    each = [sa.func.set_config(sa.literal_column(f"'{name}'"), value, sa.true()) for name, value in settings.items()]
    return sa.select(sa.func.concat(*each) if len(each) > 1 else each[0]).scalar_subquery().is_not(None)


#: A value of the setting synchronous_commit.
OFF: sa.ColumnClause[str] = sa.literal_column("'off'")


def lanes(jobs: sa.Table, queue: sa.BindParameter[str], *of_first: sa.Column[Any]) -> sa.Select[Any]:
    """PostgreSQL: the priorities that pending jobs of one queue have, the highest first; and these columns of the first
    job of each, in the order of claims.

    By stepping through the claim index from one priority to the next, from above the highest that there can be.
    """
    pending: sa.ColumnClause[str] = sa.literal_column("'pending'")
    above_all = sa.literal_column("32768", sa.Integer)
    nothing = [sa.cast(sa.null(), column.type).label(column.name) for column in of_first]
    lane = sa.select(above_all.label("priority"), *nothing).cte("lane", recursive=True)
    following = (
        sa.select(sa.cast(jobs.c.priority, sa.Integer).label("priority"), *of_first)
        .where(
            jobs.c.queue == queue,
            jobs.c.status == pending,
            jobs.c.waits_for.is_(None),
            jobs.c.priority < lane.c.priority,
        )
        .order_by(jobs.c.priority.desc(), *([jobs.c.run_at, jobs.c.id] if of_first else []))
        .limit(sa.literal_column("1"))
        .correlate(lane)
        .lateral("following")
    )
    lane = lane.union_all(sa.select(*following.c).select_from(lane.join(following, sa.true())))
    return sa.select(*lane.c).where(lane.c.priority < above_all)


def due(
    dialect_name: str,
    jobs: sa.Table,
    columns: Sequence[sa.ColumnElement[Any]],
    queue: sa.BindParameter[str],
    filters: sa.ColumnElement[bool],
    limit: sa.BindParameter[int],
    *,
    from_marks: bool = True,
) -> sa.Select[Any]:
    """The jobs to claim next in one queue: highest priority first, then longest due, then lowest id; locked.

    PostgreSQL: lane by lane, and only what is due. So jobs scheduled for later cost nothing, however many there are
    and however high their priority. The parameter `lanes` names the lanes, each from its mark on; without `from_marks`
    they are all that there are, from the front.
    """
    pending: sa.ColumnClause[str] = sa.literal_column("'pending'")
    if dialect_name == SQLITE:
        return (
            sa.select(*columns)
            .where(
                jobs.c.queue == queue,
                jobs.c.status == pending,
                jobs.c.waits_for.is_(None),
                jobs.c.run_at <= now(),
                filters,
            )
            .order_by(jobs.c.priority.desc(), jobs.c.run_at, jobs.c.id)
            .limit(limit)
        )
    lane: sa.FromClause
    if from_marks:
        lane = rows(
            dialect_name,
            "lanes",
            sa.column("priority", sa.SmallInteger),
            sa.column("run_at", sa.DateTime(timezone=True)),
            sa.column("id", sa.BigInteger),
        )
        filters = sa.and_(
            sa.tuple_(jobs.c.run_at, jobs.c.id) > sa.tuple_(lane.c.run_at, lane.c.id),
            filters,
        )
    else:
        lane = lanes(jobs, queue).subquery("lane")
    found = (
        sa.select(*columns)
        .where(
            jobs.c.queue == queue,
            jobs.c.priority == lane.c.priority,
            jobs.c.status == pending,
            jobs.c.waits_for.is_(None),
            jobs.c.run_at <= now(),
            filters,
        )
        .order_by(jobs.c.run_at, jobs.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .correlate(lane)
        .lateral("due")
    )
    return sa.select(*found.c).select_from(lane.join(found, sa.true())).limit(limit)


def first_of_each(
    dialect_name: str,
    table: sa.Table,
    wanted: sa.FromClause,
    matches: sa.ColumnElement[bool],
    order: Sequence[sa.ColumnElement[Any]],
) -> sa.Select[Any]:
    """The ids of the first `wanted.n` rows of the table that match each row of `wanted`, locked where that can be done
    without waiting; the columns of `wanted`; and `there`, how many match, counted up to `wanted.n`.

    When fewer are found than are there, others have locked some. In that case the id may be NULL.
    """
    if dialect_name == POSTGRESQL:
        found = (
            sa.select(table.c.id)
            .where(matches)
            .order_by(*order)
            .limit(wanted.c.n)
            .with_for_update(skip_locked=True)
            .correlate(wanted)
            .lateral("first")
        )
        some = sa.select(table.c.id).where(matches).limit(wanted.c.n).correlate(wanted).subquery("some")
        there = sa.select(sa.func.count().label("there")).select_from(some).correlate(wanted).lateral("counted")
        return (
            sa.select(found.c.id, *wanted.c, there.c.there)
            .select_from(wanted.join(there, sa.true()).outerjoin(found, sa.true()))
            .where(there.c.there > 0)
        )
    numbered = (
        sa.select(
            table.c.id,
            *wanted.c,
            sa.func.row_number().over(partition_by=[*wanted.c], order_by=list(order)).label("number"),
        )
        .select_from(wanted.join(table, matches))
        .subquery("numbered")
    )
    columns = [numbered.c[column.name] for column in wanted.c]
    return sa.select(numbered.c.id, *columns, sa.literal_column("0").label("there")).where(
        numbered.c.number <= numbered.c.n
    )


def first_where(
    dialect_name: str,
    table: sa.Table,
    wanted: sa.FromClause,
    matches: sa.ColumnElement[bool],
    order: Sequence[sa.ColumnElement[Any]],
    limit: sa.ColumnElement[int],
) -> sa.FromClause:
    """The first so many rows of the table that match each row of `wanted`, in any order. On SQLite, all of them."""
    if dialect_name == POSTGRESQL:
        found = sa.select(table).where(matches).order_by(*order).limit(limit).correlate(wanted).lateral("first")
        return sa.select(found).select_from(wanted.join(found, sa.true())).subquery("found")
    return sa.select(table).select_from(wanted.join(table, matches)).subquery("found")
