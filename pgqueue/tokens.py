"""Bearer tokens of the HTTP surface: who may call, and what for.

Only digests are kept, so that no log line, traceback or memory dump of this process shows a token.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pgqueue.errors import ConfigurationError

TOKENS_VARIABLE = "PGQUEUE_HTTP_TOKENS"

#: Shorter ones could be guessed.
SECRET_CHARACTERS_MIN = 16

#: What a token may be made of in an `Authorization` header (RFC 6750).
_SECRET = re.compile(r"[A-Za-z0-9\-._~+/]+=*")

_DIGEST = re.compile(r"sha256=([0-9a-fA-F]{64})")

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


class Scope(StrEnum):
    """What a token allows."""

    ENQUEUE = "enqueue"  #: store jobs
    WORK = "work"  #: claim jobs, extend claims, and say how they ended
    OPERATE = "operate"  #: put dead jobs back to pending
    READ = "read"  #: look at jobs and counts


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: the name of a token, for logs and records, and what it allows."""

    name: str
    scopes: frozenset[Scope]


#: Who calls where no tokens are asked for.
ANYONE = Principal("anyone", frozenset(Scope))


class Tokens:
    """The tokens that are accepted, by their digests."""

    def __init__(self, principals: Mapping[bytes, Principal]) -> None:
        self._principals = dict(principals)

    def __repr__(self) -> str:
        return f"Tokens({', '.join(sorted(principal.name for principal in self._principals.values()))})"

    def __bool__(self) -> bool:
        return bool(self._principals)

    def find(self, token: str) -> Principal | None:
        """Whose token this is. Takes as long whether, and wherever, it is found."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        found = None
        for known, principal in self._principals.items():
            if hmac.compare_digest(known, digest):
                found = principal
        return found


def parse_tokens(lines: Iterable[str], where: str) -> Tokens:
    """Tokens from lines such as `shop:enqueue,read:SECRET`; empty ones and comments (#) are skipped.

    Instead of the secret itself, `sha256=` and the hex digest of it will do. ConfigurationError names the line and
    `where` it stands, and never shows a secret.
    """
    principals: dict[bytes, Principal] = {}
    names: set[str] = set()
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        principal, digest = _parse_entry(entry, f"{where}, token {number}")
        if digest in principals:
            raise ConfigurationError(f"{where}, token {number}: the same secret is there twice")
        if principal.name in names:
            raise ConfigurationError(f"{where}, token {number}: the name {principal.name!r} is there twice")
        names.add(principal.name)
        principals[digest] = principal
    return Tokens(principals)


def _parse_entry(entry: str, what: str) -> tuple[Principal, bytes]:
    name, _, rest = entry.partition(":")
    scope_names, separator, secret = rest.partition(":")
    if not separator:
        raise ConfigurationError(f"{what}: expected NAME:SCOPE,SCOPE:SECRET, such as shop:enqueue,read:…")
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{what}: the name must be 1 to 64 letters, digits or any of _ . -")
    try:
        scopes = frozenset(Scope(scope.strip()) for scope in scope_names.split(","))
    except ValueError:
        raise ConfigurationError(
            f"{what} ({name}): scopes must be some of {', '.join(Scope)}, separated by commas"
        ) from None
    digest = _DIGEST.fullmatch(secret)
    if digest:
        return Principal(name, scopes), bytes.fromhex(digest[1])
    if len(secret) < SECRET_CHARACTERS_MIN or not _SECRET.fullmatch(secret):
        raise ConfigurationError(
            f"{what} ({name}): the secret must be at least {SECRET_CHARACTERS_MIN} letters, digits or any of "
            "- . _ ~ + / (or sha256= and 64 hex digits); make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return Principal(name, scopes), hashlib.sha256(secret.encode()).digest()


def tokens_from_file(path: Path) -> Tokens:
    """Tokens from a file, a line each. ConfigurationError when it cannot be read or has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"cannot read the tokens in {str(path)!r}: {reason}") from None
    tokens = parse_tokens(lines, str(path))
    if not tokens:
        raise ConfigurationError(f"there are no tokens in {str(path)!r}; expected lines of NAME:SCOPE,SCOPE:SECRET")
    return tokens


def tokens_from_environment(environ: Mapping[str, str] | None = None) -> Tokens:
    """The tokens in PGQUEUE_HTTP_TOKENS, separated by white space; there may be none."""
    environ = os.environ if environ is None else environ
    return parse_tokens(environ.get(TOKENS_VARIABLE, "").split(), TOKENS_VARIABLE)
