"""What is shipped is what is in `llambo/`, and the scripts start what is there."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llambo"
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert len(folders) > 30
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()
    assert SETUPTOOLS["packages"]["find"] == {"include": ["llambo*"]}


@pytest.mark.parametrize("script", sorted(PYPROJECT["project"]["scripts"]))
def test_a_script_starts_a_function_that_is_there(script: str) -> None:
    module, _, function = PYPROJECT["project"]["scripts"][script].partition(":")
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert f"def {function}(" in path.read_text(encoding="utf-8")


def test_the_licence_is_the_one_that_is_named() -> None:
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_files_that_are_not_code_are_shipped_too() -> None:
    shipped = {
        path
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    present = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert shipped == present
