"""Empty databases, a history that can be lengthened."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from deployers import HEAD, NEXT, Deployers

from pgqueue import migration
from pgqueue.engine import make_engine


@pytest.fixture(params=["postgresql", "sqlite"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path, pg_version: str | None) -> str:
    """An empty database; the test runs once on PostgreSQL and once on SQLite."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/empty.db"
    chosen: str = request.getfixturevalue("empty_pg_url")
    return chosen


@pytest.fixture
def empty(empty_url: str) -> Iterator[sa.Engine]:
    """pgqueue's engine on an empty database; PostgreSQL, then SQLite."""
    engine = make_engine(empty_url)
    yield engine
    engine.dispose()


@pytest.fixture
def empty_pg(empty_pg_url: str) -> Iterator[sa.Engine]:
    engine = make_engine(empty_pg_url)
    yield engine
    engine.dispose()


@pytest.fixture
def longer_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Call it with the upgrade of one more revision, NEXT: this process then uses a copy of the migrations
    that has it. Returns the folder."""

    def lengthen(upgrade: str) -> Path:
        folder = tmp_path / "longer"
        shutil.copytree(migration.migrations_path(), folder, ignore=shutil.ignore_patterns("__pycache__"))
        lines = "\n".join(f"    {line}" for line in upgrade.strip().splitlines())
        (folder / "versions" / f"{NEXT}_go_on.py").write_text(
            "import os\nimport threading\nfrom pathlib import Path\n\n"
            "import sqlalchemy as sa\nfrom alembic import op\n\n"
            f"revision = '{NEXT}'\ndown_revision = '{HEAD}'\n\n"
            f"def upgrade():\n{lines}\n\ndef downgrade():\n    pass\n"
        )
        monkeypatch.setattr(migration, "migrations_path", lambda: folder)
        monkeypatch.setattr(migration, "HEAD", NEXT)
        return folder

    return lengthen


@pytest.fixture
def deployers(tmp_path: Path) -> Iterator[Deployers]:
    folder = tmp_path / "deployers"
    folder.mkdir()
    started = Deployers(folder)
    yield started
    started.close()
