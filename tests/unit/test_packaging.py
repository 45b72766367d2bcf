"""The folders of the repository, the links in src/llambo and pyproject.toml name the same packages."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "llambo"
#: Folders with an __init__.py that are not shipped.
NOT_SHIPPED = {"bench", "docs", "examples", "tests"}

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def top_folders() -> list[Path]:
    found = [init.parent for init in ROOT.glob("*/__init__.py")]
    return sorted(folder for folder in found if folder.name not in NOT_SHIPPED and not folder.name.startswith("."))


def packages_on_disk() -> set[str]:
    inits = [init for folder in top_folders() for init in folder.rglob("__init__.py")]
    return {"llambo", *(".".join(["llambo", *init.parent.relative_to(ROOT).parts]) for init in inits)}


def test_every_package_on_disk_is_shipped_and_no_other() -> None:
    assert set(SETUPTOOLS["packages"]) == packages_on_disk()


def test_every_package_comes_from_its_folder() -> None:
    folders = {"llambo": "src/llambo"} | {f"llambo.{folder.name}": folder.name for folder in top_folders()}
    assert SETUPTOOLS["package-dir"] == folders


def test_a_link_for_each_folder_and_no_other() -> None:
    links = {path.name: str(path.readlink()) for path in SRC.iterdir() if path.is_symlink()}
    assert links == {folder.name: f"../../{folder.name}" for folder in top_folders()}


def test_the_package_itself_holds_only_its_public_names() -> None:
    real = {path.name for path in SRC.iterdir() if not path.is_symlink() and path.name != "__pycache__"}
    assert real == {"__init__.py", "py.typed"}


@pytest.mark.parametrize("script", sorted(PYPROJECT["project"]["scripts"]))
def test_a_script_starts_a_function_that_is_there(script: str) -> None:
    module, _, function = PYPROJECT["project"]["scripts"][script].partition(":")
    path = SRC.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert f"def {function}(" in path.read_text(encoding="utf-8")


def test_the_licence_is_the_one_that_is_named() -> None:
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_what_is_no_code_is_shipped_too() -> None:
    shipped = {
        path for pattern in SETUPTOOLS["package-data"]["llambo.systemd"] for path in ROOT.glob(f"systemd/{pattern}")
    }
    there = {path for path in ROOT.glob("systemd/**/*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md")}
    assert shipped == there
