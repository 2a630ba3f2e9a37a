"""Bearer tokens: who calls, what for, and no secret in any message."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pgqueue import ConfigurationError
from pgqueue.tokens import Scope, Tokens, parse_tokens, tokens_from_environment, tokens_from_file

SECRET = "correct-horse-battery"


def test_a_token_says_who_calls_and_what_for() -> None:
    tokens = parse_tokens([f"shop:enqueue,read:{SECRET}"], "test")

    principal = tokens.find(SECRET)

    assert principal is not None
    assert (principal.name, principal.scopes) == ("shop", {Scope.ENQUEUE, Scope.READ})


@pytest.mark.parametrize("token", ["", SECRET[:-1], SECRET + "x", "shop", f"shop:enqueue:{SECRET}", "\udcff"])
def test_any_other_token_is_nobodys(token: str) -> None:
    tokens = parse_tokens([f"shop:enqueue:{SECRET}"], "test")

    assert tokens.find(token) is None


def test_a_digest_stands_for_its_token() -> None:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()

    tokens = parse_tokens([f"shop:work:sha256={digest}"], "test")

    assert tokens.find(SECRET) is not None
    assert tokens.find(f"sha256={digest}") is None


def test_a_file_has_a_token_a_line_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# who may call\n\nshop:enqueue:{SECRET}\n  worker : work :{SECRET}2\n".replace(" : ", ":"))

    tokens = tokens_from_file(path)

    assert repr(tokens) == "Tokens(shop, worker)"


def test_the_environment_has_them_separated_by_white_space() -> None:
    tokens = tokens_from_environment({"PGQUEUE_HTTP_TOKENS": f"shop:enqueue:{SECRET}\n worker:work:{SECRET}2 "})

    assert repr(tokens) == "Tokens(shop, worker)"
    assert not tokens_from_environment({})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (SECRET, "expected NAME:SCOPE,SCOPE:SECRET"),
        (f"enqueue:{SECRET}", "expected NAME:SCOPE,SCOPE:SECRET"),
        (f":enqueue:{SECRET}", "the name must be"),
        (f"sh op:enqueue:{SECRET}", "the name must be"),
        (f"shop:all:{SECRET}", "scopes must be some of enqueue, work, operate, read"),
        (f"shop::{SECRET}", "scopes must be some of"),
        ("shop:enqueue:correct-horse", "at least 16"),
        (f"shop:enqueue:{SECRET}\N{LATIN SMALL LETTER E WITH ACUTE}", "at least 16 letters, digits"),
        ("shop:enqueue:sha256=correct-horse", "sha256= and 64 hex digits"),
    ],
)
def test_a_line_that_is_wrong_is_named_without_its_secret(line: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse_tokens(["", line], "the file")

    assert "the file, token 2" in str(caught.value)
    assert "correct-horse" not in str(caught.value)


@pytest.mark.parametrize("second", [f"shop:read:{SECRET}2", f"other:read:{SECRET}"])
def test_a_name_or_secret_that_is_there_twice_is_refused(second: str) -> None:
    with pytest.raises(ConfigurationError, match=r"token 2: .* twice"):
        parse_tokens([f"shop:read:{SECRET}", second], "test")


def test_no_representation_shows_a_secret() -> None:
    tokens = parse_tokens([f"shop:enqueue:{SECRET}"], "test")

    assert SECRET not in repr(tokens) + repr(vars(tokens)) + repr(tokens.find(SECRET))


def test_a_file_that_is_not_there_or_has_no_tokens_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")

    with pytest.raises(ConfigurationError, match=r"cannot read the tokens in .*missing"):
        tokens_from_file(tmp_path / "missing")
    with pytest.raises(ConfigurationError, match=r"there are no tokens in .*empty"):
        tokens_from_file(empty)


def test_nobody_is_found_among_no_tokens() -> None:
    assert Tokens({}).find("") is None
