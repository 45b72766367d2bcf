"""What is shipped is what is in `llambo/`, and the scripts start what is there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import llambo

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built as `python -m build` does: a source distribution, and from that alone the wheel."""
    # It is not imported here: it refuses to be if a test has imported what it replaces.
    if int(metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("setuptools 77 or newer is missing: make dev")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for folder in ("llambo", "docs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "README.md", "SECURITY.md", "CHANGELOG.md"):
        shutil.copy(ROOT / file, source)
    _build("sdist", source, out)
    (sdist,) = out.glob("*.tar.gz")
    subprocess.run(["tar", "-xf", sdist, "-C", out], check=True, timeout=60)
    _build("wheel", out / sdist.name.removesuffix(".tar.gz"), out)
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def _build(what: str, source: Path, out: Path) -> None:
    code = f"import setuptools.build_meta as backend; backend.build_{what}({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_has_the_whole_package_and_the_documents(wheel: zipfile.ZipFile) -> None:
    name = f"llambo-{llambo.__version__}"
    pages = f"{name}.data/data/share/doc/llambo/"
    package = {
        str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    documents = {pages + path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".yml", ".json")}
    documents |= {pages + file for file in ("README.md", "SECURITY.md", "CHANGELOG.md")}
    shipped = {path for path in wheel.namelist() if not path.startswith(f"{name}.dist-info/")}
    assert shipped == package | documents
    assert f"{name}.dist-info/licenses/LICENSE" in wheel.namelist()
    assert "llambo/py.typed" in shipped


def test_the_wheel_has_the_programs_and_the_extras(wheel: zipfile.ZipFile) -> None:
    (folder,) = (Path(path).parent for path in wheel.namelist() if path.endswith(".dist-info/METADATA"))
    found = metadata.PathDistribution(zipfile.Path(wheel, f"{folder}/"))
    assert {script.name for script in found.entry_points.select(group="console_scripts")} == set(
        PYPROJECT["project"]["scripts"]
    )
    assert set(found.metadata.get_all("Provides-Extra") or ()) == set(PYPROJECT["project"]["optional-dependencies"])
    assert found.metadata["License-Expression"] == "Apache-2.0"
