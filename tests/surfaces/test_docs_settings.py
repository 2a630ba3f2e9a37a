"""docs/settings.md: its table is that of the code, and its blocks work."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer.main
from documents import PROJECT, Reader, blocks, table_below
from forks import Forks

from pgqueue import cli
from pgqueue.settings import SETTINGS, Sources

PAGE = PROJECT / "docs" / "settings.md"


def test_the_table_has_every_setting_as_the_code_has_it() -> None:
    described = table_below(PAGE, "All settings")

    assert described == [
        [
            f"`{setting.key}`",
            ", ".join(f"`{variable}`" for variable in setting.variables),
            f"`{setting.option}`",
            shown(setting.default),
            setting.meaning,
        ]
        for setting in SETTINGS
    ]


def shown(default: Any) -> str:
    match default:
        case None:
            return ""
        case bool():
            return f"`{str(default).lower()}`"
        case float():
            return f"`{default:g}`"
        case _:
            return f"`{default}`"


def test_every_option_of_a_setting_is_one_of_the_worker_and_the_other_way_round() -> None:
    worker = typer.main.get_command(cli.app).commands["worker"]  # type: ignore[attr-defined]
    options = {option for parameter in worker.params for option in parameter.opts if option.startswith("--")}
    of_one_command = {"--output", "--log-level", "--verbose", "--quiet", "--no-color"}

    assert {setting.option for setting in SETTINGS} == options - of_one_command


def test_the_file_works(tmp_path: Path) -> None:
    (file,) = (block.text for block in blocks(PAGE) if block.language == "toml")
    (tmp_path / "pgqueue.toml").write_text(file)

    found = Sources({}, tmp_path).find_all({})

    assert {key for key, setting in found.items() if not setting.is_default} == set(tomllib.loads(file))


def test_the_commands_and_programs_work(sqlite_url: str, tmp_path: Path, forks: Forks) -> None:
    reader = Reader(tmp_path, sqlite_url, forks)

    for block in blocks(PAGE):
        if block.language == "sh":
            printed = [reader.run(command) for command in block.commands]
            assert "60 s" in printed[0]
        elif block.language == "python":
            assert block.file_name is not None
            (tmp_path / block.file_name).write_text(block.text)
            assert "nothing done" in reader.run(f"python {block.file_name}")
