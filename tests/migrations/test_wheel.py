"""What is installed from a built wheel, with no checkout in sight: the package, its migrations and its types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel of this checkout was installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "dist"), str(CHECKOUT))
    (wheel,) = (folder / "dist").iterdir()
    run(*PIP, "install", "--no-deps", "--target", str(folder / "site"), str(wheel))
    return folder / "site"


def run(*command: str, **more: str) -> str:
    environment = {**os.environ, **more}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pgqueue(installed: Path, url: str, *arguments: str) -> str:
    """Run the command line of the installed package, wherever else there is one."""
    return run(sys.executable, "-P", "-m", "pgqueue", *arguments, PYTHONPATH=str(installed), PGQUEUE_DATABASE_URL=url)


def test_the_migrations_of_a_wheel_are_in_the_package_and_create_the_tables(installed: Path, empty_url: str) -> None:
    pgqueue(installed, empty_url, "db", "upgrade")

    pgqueue(installed, empty_url, "db", "check")
    assert Path(pgqueue(installed, empty_url, "db", "path").strip()) == installed / "pgqueue" / "migrations"


def test_a_wheel_carries_its_types_and_nothing_of_the_tests(installed: Path) -> None:
    files = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}

    assert "pgqueue/py.typed" in files
    assert not [name for name in files if {"tests", "conftest.py"} & set(Path(name).parts)]
    assert not [name for name in files if Path(name).name.startswith("test_")]
