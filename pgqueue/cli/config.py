"""`pgqueue config`."""

from __future__ import annotations

from typing import Any

from pgqueue.cli.program import Settings, app, command
from pgqueue.engine import describe_url, parse_url
from pgqueue.errors import ConfigurationError
from pgqueue.output import Format
from pgqueue.settings import SETTINGS, Sources


@command(app)
def config(settings: Settings) -> None:
    """Show every setting, its value, and where that comes from.

    The first that says something decides: a command-line option, a variable of
    the environment, the file pgqueue.toml (or [tool.pgqueue] in pyproject.toml),
    a default. What an application gives to its PgQueue(…) is not shown here.
    """
    output = settings.printer()
    sources = Sources()
    found = sources.find_all({"database_url": settings.database_url, "schema": settings.schema})
    if settings.app != found["app"].value:
        found["app"] = sources.find("app", settings.app)
    rows: list[dict[str, Any]] = []
    for setting in SETTINGS:
        value, source = found[setting.key].value, found[setting.key].source
        if setting.secret and value is not None:
            value = _described(value)
        if output.format is Format.TABLE and isinstance(value, dict):
            value = ", ".join(name if count is None else f"{name}={count}" for name, count in value.items())
        elif output.format is Format.TABLE and isinstance(value, float):
            value = f"{value:g} s"
        rows.append({"setting": setting.key, "value": value, "source": source})
    output.rows(rows, ["setting", "value", "source"])
    for misspelled in sources.misspelled():
        output.note(f"note: {misspelled}")


def _described(url: str) -> str:
    try:
        return describe_url(parse_url(url))
    except ConfigurationError:
        return "(it cannot be read)"
