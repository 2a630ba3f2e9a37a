"""Everything that docs/http.md names exists; tests/surfaces/test_http_example.py runs its lines of curl."""

from __future__ import annotations

import re
from pathlib import Path

from documents import PROJECT, Reader, blocks, table_below
from forks import Forks

from pgqueue.http import THREADS, WAITING_MAX
from pgqueue.openapi import (
    BODY_BYTES_MAX,
    DEPTH_MAX,
    ERRORS,
    LEASE_SECONDS,
    LEASE_SECONDS_MAX,
    OPERATIONS,
    PAGE_MAX,
    PRIORITIES,
    TaskBody,
)
from pgqueue.tokens import Scope, parse_tokens

PAGE = PROJECT / "docs" / "http.md"


def test_every_program_of_the_page_runs(sqlite_url: str, tmp_path: Path, forks: Forks) -> None:
    reader = Reader(tmp_path, sqlite_url, forks)
    programs = [block for block in blocks(PAGE) if block.language == "python"]

    for block in programs:
        assert block.file_name is not None
        (tmp_path / block.file_name).write_text(block.text)
        reader.run(f"python {block.file_name}")

    assert programs


def test_every_request_is_described_with_its_scope() -> None:
    described = {row[0].strip("`"): row[1] for row in table_below(PAGE, "Requests")}

    assert described == {f"{operation.methods[0]} {operation.path}": operation.scope or "" for operation in OPERATIONS}


def test_every_option_of_an_enqueue_is_described() -> None:
    described = {row[0].strip("`") for row in table_below(PAGE, "Enqueue")}

    options = {field.alias for field in TaskBody.model_fields.values()}

    assert described == options - {"type", "payload"}


def test_every_status_of_an_error_every_scope_and_every_limit_is_named() -> None:
    text = PAGE.read_text()

    assert [status for status in ERRORS if not re.search(rf"\b{status}\b", text)] == []
    assert [scope for scope in Scope if f"| {scope} |" not in text] == []
    for number in (THREADS, WAITING_MAX, DEPTH_MAX, PAGE_MAX, *PRIORITIES.values(), int(LEASE_SECONDS)):
        assert str(number) in text
    assert f"{BODY_BYTES_MAX:,}" in text
    assert f"{LEASE_SECONDS_MAX:.0f}" in text


def test_the_lines_of_tokens_are_understood() -> None:
    (block,) = (block for block in blocks(PAGE) if block.language == "text" and "sha256=" in block.text)

    tokens = parse_tokens(block.text.splitlines(), PAGE.name)

    found = tokens.find(block.text.splitlines()[0].rpartition(":")[2])
    assert found is not None
    assert (found.name, found.scopes) == ("shop", {Scope.ENQUEUE, Scope.READ})
    assert repr(tokens) == "Tokens(mailer, shop)"


def test_every_link_leads_to_a_file() -> None:
    for page in (PAGE, PROJECT / "examples" / "http" / "README.md"):
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text())

        assert links
        assert [link for link in links if not (page.parent / link).exists()] == []
