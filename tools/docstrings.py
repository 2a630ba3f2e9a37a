"""How the docstrings of pgqueue become a reference. They are prose: a paragraph in which a line begins with the name of
a parameter and a colon, or with several names, tells of these; `#:` behind a field is its docstring."""

from __future__ import annotations

import re
from typing import Any

import griffe

_TERM = re.compile(r"^(?P<names>`?[a-z_]\w*(?:=\w+)?`?(?:, `?[a-z_]\w*`?)*): (?=\S)")


class Prose(griffe.Extension):
    """Griffe calls it for each object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_lists(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        twin = func.name.removesuffix("_async")
        if func.docstring is None and twin != func.name:
            func.docstring = griffe.Docstring(f"As `{twin}`, for asynchronous code.", parent=func)

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.lineno is not None and not attr.is_alias:
            comment = comment_of(attr)
            if comment:
                attr.docstring = griffe.Docstring(comment, parent=attr)


def comment_of(attr: griffe.Attribute) -> str:
    """What stands behind `#:` on the attribute's own line, or on the lines before it."""
    lines = attr.lines_collection[attr.filepath]
    number = (attr.lineno or 1) - 1
    _, mark, behind = lines[number].partition("#: ")
    if mark:
        return behind.strip()
    above: list[str] = []
    while number > 0 and lines[number - 1].strip().startswith("#: "):
        number -= 1
        above.insert(0, lines[number].strip().removeprefix("#: "))
    return " ".join(above)


def with_lists(text: str) -> str:
    """The text with lines that begin with a name and a colon as items of a list."""
    done: list[str] = []
    inside = False
    for line in text.splitlines():
        term = _TERM.match(line)
        if term:
            if not inside:
                done.append("")
            names = ", ".join(f"`{name.strip('`')}`" for name in term["names"].split(", "))
            done.append(f"* {names}: {line[term.end() :]}")
            inside = True
        elif inside and line.strip() and not line.startswith(" "):
            done.append(f"    {line}")
        else:
            inside = False
            done.append(line)
    return "\n".join(done)
