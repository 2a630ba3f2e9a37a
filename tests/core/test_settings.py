"""Settings come from the first place that has them, and what cannot work is refused with that place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pgqueue import ConfigurationError, PgQueue, WorkerConfig
from pgqueue.settings import SETTINGS, Found, Sources, worker_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The root of a repository."""
    (tmp_path / ".git").mkdir()
    return tmp_path


def sources(folder: Path, **environ: str) -> Sources:
    return Sources(environ, folder)


# Which place decides ---------------------------------------------------------------------------------------


def test_an_option_wins_over_the_environment_over_the_file_over_the_default(folder: Path) -> None:
    file = folder / "pgqueue.toml"
    file.write_text('lease = "20s"\n')

    given = sources(folder, PGQUEUE_LEASE="40s").find("lease", 50.0)
    from_environment = sources(folder, PGQUEUE_LEASE="40s").find("lease")
    from_file = sources(folder).find("lease")
    default = sources(folder).find("poll_interval")

    assert [given, from_environment, from_file, default] == [
        Found(50.0, "--lease"),
        Found(40.0, "PGQUEUE_LEASE"),
        Found(20.0, str(file)),
        Found(1.0, "default"),
    ]


def test_an_empty_variable_says_nothing(folder: Path) -> None:
    assert sources(folder, PGQUEUE_LEASE="").find("lease").is_default


def test_false_and_zero_are_something_that_was_said(folder: Path) -> None:
    (folder / "pgqueue.toml").write_text("listen = false\nprefetch = 0\n")

    found = sources(folder, PGQUEUE_DRAIN="0").find_all({"shutdown_timeout": 0.0})

    assert [found[key].value for key in ("listen", "prefetch", "drain", "shutdown_timeout")] == [False, 0, False, 0.0]


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({}, "sqlite:///file.db"),
        ({"DATABASE_URL": "b"}, "b"),
        ({"PGQUEUE_DATABASE_URL": "a", "DATABASE_URL": "b"}, "a"),
        ({"PGQUEUE_DATABASE_URL": "", "DATABASE_URL": "b"}, "b"),
    ],
)
def test_the_database_is_that_of_the_environment_before_that_of_the_file(
    folder: Path, environ: dict[str, str], url: str
) -> None:
    (folder / "pgqueue.toml").write_text('database_url = "sqlite:///file.db"\n')

    assert sources(folder, **environ).find("database_url").value == url


# Which file ------------------------------------------------------------------------------------------------


def test_the_nearest_file_up_to_the_root_of_the_repository_counts_alone(folder: Path) -> None:
    inner = folder / "a" / "b"
    inner.mkdir(parents=True)
    (folder / "pgqueue.toml").write_text("processes = 2\nlease = 20\n")

    from_root = sources(inner).find("processes")
    (folder / "a" / "pgqueue.toml").write_text("processes = 3\n")
    nearest = sources(inner)

    assert from_root == Found(2, str(folder / "pgqueue.toml"))
    assert nearest.find("processes") == Found(3, str(folder / "a" / "pgqueue.toml"))
    assert nearest.find("lease").is_default


def test_nothing_above_the_root_of_the_repository_counts(folder: Path) -> None:
    (folder / "pgqueue.toml").write_text("processes = 2\n")
    repository = folder / "repository"
    (repository / ".git").mkdir(parents=True)

    assert sources(repository).find("processes").is_default


def test_outside_of_a_repository_only_the_working_directory_counts(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "pgqueue.toml").write_text("processes = 2\n")

    assert sources(inner).find("processes").is_default
    assert sources(tmp_path).find("processes").value == 2


def test_pyproject_counts_where_it_has_a_table_for_pgqueue(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    (inner / "pyproject.toml").write_text("[project]\nname = 'inner'\n")
    (folder / "pyproject.toml").write_text("[tool.pgqueue]\nprocesses = 2\n[tool.other]\nunknown = 1\n")

    assert sources(inner).find("processes") == Found(2, str(folder / "pyproject.toml"))


def test_pgqueue_toml_wins_over_the_pyproject_beside_it(folder: Path) -> None:
    (folder / "pgqueue.toml").write_text("processes = 2\n")
    (folder / "pyproject.toml").write_text("[tool.pgqueue]\nprocesses = 3\n")

    assert sources(folder).find("processes").value == 2


def test_a_variable_names_another_file(folder: Path) -> None:
    (folder / "pgqueue.toml").write_text("processes = 2\n")
    (folder / "production.toml").write_text("processes = 8\n")

    assert sources(folder, PGQUEUE_CONFIG="production.toml").find("processes").value == 8
    assert sources(folder, PGQUEUE_CONFIG=str(folder / "production.toml")).find("processes").value == 8


def test_a_file_that_was_named_must_exist(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml cannot be read: No such file or directory"):
        sources(folder, PGQUEUE_CONFIG="nowhere.toml").find("processes")


def test_no_file_is_read_when_the_environment_says_it_all(folder: Path) -> None:
    (folder / "pgqueue.toml").write_text("broken")

    assert sources(folder, PGQUEUE_DATABASE_URL="sqlite://").find("database_url").value == "sqlite://"


# Values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "queues"),
    [
        ('queues = "images=4,mails"', {"images": 4, "mails": None}),
        ('queues = ["images=4", "mails"]', {"images": 4, "mails": None}),
        ("queues = { images = 4, mails = 10 }", {"images": 4, "mails": 10}),
        ("[queues]\nimages = 4", {"images": 4}),
    ],
)
def test_queues_are_written_as_a_text_a_list_or_a_table(folder: Path, text: str, queues: dict[str, Any]) -> None:
    (folder / "pgqueue.toml").write_text(text)

    assert sources(folder).find("queues").value == queues


def test_durations_are_texts_or_seconds(folder: Path) -> None:
    (folder / "pgqueue.toml").write_text('lease = "1m"\npoll_interval = 2\nsweep_interval = 0.5\n')

    found = sources(folder, PGQUEUE_SHUTDOWN_TIMEOUT="90").find_all({})

    keys = ("lease", "poll_interval", "sweep_interval", "shutdown_timeout")
    assert [found[key].value for key in keys] == [60.0, 2.0, 0.5, 90.0]


@pytest.mark.parametrize("text", ["true", "1", "yes", "on", "TRUE"])
def test_a_flag_of_the_environment_is_a_word(folder: Path, text: str) -> None:
    assert sources(folder, PGQUEUE_DRAIN=text).find("drain").value is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("leese = 5", "there is no setting 'leese'; did you mean 'lease'?"),
        ("poll-interval = 5", "there is no setting 'poll-interval'; did you mean 'poll_interval'?"),
        ("zzz = 5", "there is no setting 'zzz'; settings are: database_url, schema, app, queues"),
        ("[worker]\nlease = 5", "there is no setting 'worker'"),
        ('lease = "soon"', 'lease must be a duration such as "30s" or "5m", or a number of seconds, got \'soon\''),
        ("lease = true", 'lease must be a duration such as "30s" or "5m", or a number of seconds, got true'),
        ("lease = nan", "lease must be a duration"),
        ("lease = inf", "lease must be a duration"),
        ("lease = -1", "lease must be a duration"),
        ("lease = [1]", "lease must be a duration"),
        ('processes = "2"', "processes must be a whole number between 1 and 1000, got '2'"),
        ("processes = 2.5", "processes must be a whole number between 1 and 1000, got 2.5"),
        ("processes = 0", "processes must be a whole number between 1 and 1000, got 0"),
        ("processes = true", "processes must be a whole number between 1 and 1000, got true"),
        ("concurrency = 1001", "concurrency must be a whole number between 1 and 1000, got 1001"),
        ('listen = "yes"', "listen must be true or false, got 'yes'"),
        ("listen = 1", "listen must be true or false, got 1"),
        ('queues = "a b"', "queues must be queues with their concurrency, such as"),
        ('queues = ["a", "a"]', "(queue 'a' is named twice)"),
        ("queues = { a = 0 }", "queues must be"),
        ('queues = { "a b" = 1 }', "queue name must be 1 to 128 letters"),
        ("queues = {}", "queues must be"),
        ("queues = []", "queues must be"),
        ("app = 5", "app must be a text such as myapp.jobs:pgq, got 5"),
        ('app = ""', "app must be a text such as myapp.jobs:pgq, got ''"),
        ("lease = ", "is not TOML"),
        ("lease = 1\nlease = 2", "is not TOML"),
    ],
)
def test_what_a_file_cannot_say_is_refused_with_the_file_the_key_and_what_was_expected(
    folder: Path, text: str, message: str
) -> None:
    file = folder / "pgqueue.toml"
    file.write_text(text)

    with pytest.raises(ConfigurationError) as refused:
        sources(folder).find("lease")

    assert str(refused.value).startswith(str(file))
    assert message in str(refused.value)


@pytest.mark.parametrize("text", ["tool = 5", "[tool]\npgqueue = 5", "[[tool.pgqueue]]\nlease = 5"])
def test_a_pyproject_with_something_else_in_place_of_the_table(folder: Path, text: str) -> None:
    (folder / "pyproject.toml").write_text(text)

    if text == "tool = 5":
        assert sources(folder).find("lease").is_default
    else:
        with pytest.raises(ConfigurationError, match=r"tool\.pgqueue must be a table"):
            sources(folder).find("lease")


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("PGQUEUE_LEASE", "soon", "the variable PGQUEUE_LEASE must be a duration such as"),
        ("PGQUEUE_PROCESSES", "many", "the variable PGQUEUE_PROCESSES must be a whole number between 1 and 1000"),
        ("PGQUEUE_LISTEN", "perhaps", "the variable PGQUEUE_LISTEN must be true or false, got 'perhaps'"),
        ("PGQUEUE_QUEUES", "a=b", "(queue 'a=b': expected NAME or NAME=CONCURRENCY)"),
    ],
)
def test_what_a_variable_cannot_say_is_refused_with_its_name(
    folder: Path, variable: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        sources(folder, **{variable: text}).find_all({})

    assert message in str(refused.value)


def test_a_url_that_is_no_text_is_refused_without_being_shown(folder: Path) -> None:
    (folder / "pgqueue.toml").write_text('database_url = ["postgresql://ada:hunter2@localhost/shop"]\n')

    with pytest.raises(ConfigurationError) as refused:
        sources(folder).find("database_url")

    assert "database_url must be a URL" in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_file_that_may_not_be_read_is_named(folder: Path) -> None:
    (folder / "pgqueue.toml").mkdir()

    with pytest.raises(ConfigurationError, match=r"cannot be read: Is a directory"):
        sources(folder, PGQUEUE_CONFIG="pgqueue.toml").find("lease")


def test_variables_that_look_like_settings_are_pointed_out(folder: Path) -> None:
    found = sources(folder, PGQUEUE_LEESE="5", PGQUEUE_SERVICE_HOST="10.0.0.1", PGQUEUE_LEASE="5", PGQUEUE_APPP="x")

    assert list(found.misspelled()) == [
        "the variable PGQUEUE_APPP sets nothing; did you mean PGQUEUE_APP?",
        "the variable PGQUEUE_LEESE sets nothing; did you mean PGQUEUE_LEASE?",
    ]


# What becomes of them --------------------------------------------------------------------------------------


def test_a_worker_is_configured_by_what_was_found(folder: Path) -> None:
    (folder / "pgqueue.toml").write_text('queues = "images=4,mails"\nconcurrency = 7\nlisten = false\n')

    config = worker_config(sources(folder, PGQUEUE_LEASE="60").find_all({"drain": True}), ["default"])

    assert config == WorkerConfig(queues={"images": 4, "mails": 7}, listen=False, lease=60.0, drain=True)


def test_without_queues_a_worker_works_on_those_of_the_tasks(folder: Path) -> None:
    config = worker_config(sources(folder, PGQUEUE_CONCURRENCY="3").find_all({}), ["a", "b"])

    assert config == WorkerConfig(queues={"a": 3, "b": 3})


def test_settings_that_contradict_each_other_are_refused_with_where_they_come_from(folder: Path) -> None:
    (folder / "pgqueue.toml").write_text("lease = 10\n")

    with pytest.raises(ConfigurationError) as refused:
        worker_config(sources(folder, PGQUEUE_HEARTBEAT_INTERVAL="6").find_all({}), ["a"])

    assert str(refused.value) == (
        "heartbeat_interval must be more than 0 and at most half of the lease (5 s), got 6.0; "
        f"lease comes from {folder / 'pgqueue.toml'}; heartbeat_interval comes from PGQUEUE_HEARTBEAT_INTERVAL"
    )


def test_every_setting_of_a_worker_can_be_set() -> None:
    keys = [setting.key for setting in SETTINGS]

    assert set(WorkerConfig.__dataclass_fields__) <= set(keys)
    assert len(set(keys)) == len(keys)


def test_an_application_takes_database_and_schema_from_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGQUEUE_DATABASE_URL", "DATABASE_URL", "PGQUEUE_SCHEMA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    (folder / "pgqueue.toml").write_text('database_url = "sqlite:///of_the_file.db"\nschema = "shop"\n')

    pgq, own = PgQueue(), PgQueue("sqlite:///own.db", schema="own")

    assert (pgq.url.database, pgq.schema) == ("of_the_file.db", "shop")
    assert (own.url.database, own.schema) == ("own.db", "own")
