"""docs/seeds.md: no capability is left out, and what is said to show one exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import groupby

import pytest
from documents import PROJECT

PAGE = PROJECT / "docs" / "seeds.md"

#: How many capabilities each of the systems has.
CAPABILITIES = {"A": 27, "B": 37, "C": 33, "D": 51, "E": 25}

NOT_HERE = "Not here"

_ROW = re.compile(r"^\| ([A-Z])(\d+) \| ([^|]+) \| ([^|]+) \| ([^|]*?) ?\|$", re.MULTILINE)

ROWS = _ROW.findall(PAGE.read_text())


def test_every_capability_has_its_line_in_order() -> None:
    numbers = {
        letter: [int(number) for _, number, *_ in rows] for letter, rows in groupby(ROWS, key=lambda cells: cells[0])
    }

    assert numbers == {letter: list(range(1, count + 1)) for letter, count in CAPABILITIES.items()}
    assert len(ROWS) == sum(line.startswith("| ") for line in PAGE.read_text().splitlines()) - len(CAPABILITIES)


def test_every_line_names_tests_or_says_why_it_has_none() -> None:
    for letter, number, _, here, shown in ROWS:
        references = re.findall(r"`tests/[^`]+`", shown)
        assert " ".join(references) == shown, f"{letter}{number} names something that is no test: {shown}"
        assert references or here.startswith(NOT_HERE), f"{letter}{number} names no test and does not say why"


@pytest.mark.parametrize("reference", sorted(set(re.findall(r"`(tests/[^`]+)`", PAGE.read_text()))))
def test_every_test_that_is_named_exists(reference: str) -> None:
    path, _, name = reference.partition("::")

    assert name in _tests_of(path)


@cache
def _tests_of(path: str) -> set[str]:
    """The tests of a file that are run: none that pytest would not collect, or that skips whatever happens."""
    return {
        node.name
        for node in ast.parse((PROJECT / path).read_text()).body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not any("mark.skip" in ast.unparse(mark) for mark in node.decorator_list)
    }


def test_every_link_leads_to_a_file() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link
