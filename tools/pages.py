"""What MkDocs cannot do by itself for this site: the reference of the command line, made from the commands, and pages
and files of the project that stand outside of docs/."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from pgqueue import cli

PROJECT = Path(__file__).resolve().parent.parent

#: Pages outside of docs/. They keep their paths.
PAGES = ("CHANGELOG.md", "examples/README.md", "examples/*/README.md")

COMMANDS = "reference/commands.md"

#: A section of the README, which is no page itself: its front is the site's.
PROMISE, PROMISE_ANCHOR = "promise.md", "#the-promise"

#: Options that every command has, told of once.
COMMON = ("--database-url", "--schema", "--app", "--output", "--log-level", "--verbose", "--quiet", "--no-color")

_LINK = re.compile(r"(!?\[(?P<text>[^\]]*)\])\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, COMMANDS, content=commands_page()))
    files.append(File.generated(config, PROMISE, content=promise_page()))
    for path in outside_pages():
        files.append(File.generated(config, path, content=(PROJECT / path).read_text()))
    for path in linked_sources(files):
        files.append(File.generated(config, path, abs_src_path=str(PROJECT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links between pages, which are right in the project's folders, to where they are in the site."""
    return _LINK.sub(lambda link: _in_site(link, page.file.src_uri), markdown)


def outside_pages() -> list[str]:
    return sorted(path.relative_to(PROJECT).as_posix() for pattern in PAGES for path in PROJECT.glob(pattern))


def linked_sources(files: Files) -> set[str]:
    """Files of the project, no pages, that pages lead to."""
    found = set()
    for file in files.documentation_pages():
        for link in _LINK.finditer(file.content_string):
            target = _target(file.src_uri, link["path"])
            if not target.startswith("docs/") and not target.endswith(".md") and (PROJECT / target).is_file():
                found.add(target)
    return found


def _target(src_uri: str, link: str) -> str:
    """What a link on a page leads to, from the project's folder."""
    page = src_uri if src_uri in outside_pages() else f"docs/{src_uri}"
    return os.path.normpath(PurePosixPath(page).parent / link)


def _in_site(link: re.Match[str], src_uri: str) -> str:
    target, anchor = _target(src_uri, link["path"]), link["anchor"] or ""
    if (PROJECT / target).is_dir():
        return link["text"]
    if target == "README.md":
        target, anchor = (f"docs/{PROMISE}", "") if anchor == PROMISE_ANCHOR else ("docs/index.md", anchor)
    there = os.path.relpath(target.removeprefix("docs/"), PurePosixPath(src_uri).parent)
    return f"{link[1]}({there}{anchor})"


def promise_page() -> str:
    _, _, below = (PROJECT / "README.md").read_text().partition("\n## The promise\n")
    section = below.partition("\n## ")[0]
    assert section, "README.md has no section about the promise"
    return f"# The promise\n{section}"


# The command line ----------------------------------------------------------------------------------------------


def commands_page() -> str:
    """A section for each command, from its own help."""
    program = typer.main.get_command(cli.app)
    lines = [
        "# Command line",
        "",
        "Made from the help of the commands themselves. Every command also takes the options of `pgqueue`, and "
        "`--help`. Data goes to stdout, everything else to stderr. Every setting that has a variable can stand in a "
        "file as well: [settings](../settings.md). What the commands are for, at a glance: "
        "[in production](../operating.md#the-commands-of-a-day).",
        "",
        *_section("pgqueue", program, ()),
    ]
    for name, command in commands_of(program, "pgqueue"):
        lines += _section(name, command, COMMON)
    return "\n".join(lines)


def commands_of(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in group.list_commands(None):
        command = group.commands[name]
        if command.hidden:
            continue
        yield f"{prefix} {name}", command
        if hasattr(command, "commands"):
            yield from commands_of(command, f"{prefix} {name}")


def _section(name: str, command: Any, left_out: tuple[str, ...]) -> Iterator[str]:
    yield f"## `{name}`"
    yield ""
    yield from _prose(command.help)
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [
        option
        for option in command.params
        if option.param_type_name == "option" and not option.hidden and not set(option.opts) & set(left_out)
    ]
    if hasattr(command, "commands"):
        yield f"Commands: {', '.join(f'`{below}`' for below in command.list_commands(None))}."
        yield ""
    else:
        words = [name, *(["[OPTIONS]"] if command.params else []), *map(_usage, arguments)]
        yield from ("```text", " ".join(words), "```", "")
    if arguments or options:
        yield from ("| | meaning | default |", "|---|---|---|")
        yield from (f"| `{_metavar(argument)}` | {_cell(argument.help)} | |" for argument in arguments)
        yield from map(_option_row, options)
        yield ""


def _prose(text: str) -> Iterator[str]:
    """A help text. What is indented in it is a list, or lines to type."""
    for paragraph in text.strip().split("\n\n"):
        head, _, rest = paragraph.partition("\n")
        if rest.startswith("  "):
            yield from (head, "", "```text", textwrap.dedent(rest), "```", "")
        else:
            yield from (paragraph, "")


def _usage(argument: Any) -> str:
    shown = f"{_metavar(argument)}{'...' if argument.nargs == -1 else ''}"
    return shown if argument.required else f"[{shown}]"


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper()).strip("[]").removesuffix("...")


def _option_row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = f" {_cell(option.metavar)}" if option.metavar and not option.is_flag else ""
    default = option.show_default if isinstance(option.show_default, str) else option.default
    shown = "" if default is None or option.is_flag or option.count or callable(default) else str(default)
    return f"| {names}{value} | {_cell(option.help)} | {_cell(shown)} |"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
