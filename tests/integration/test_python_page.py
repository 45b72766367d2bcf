"""The Python of README.md and docs/python.md, in its order and as it is written there, on a mesh with keys."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llambo import Client, LlamboError, SyncClient
from llambo.broker.config import BrokerConfig, Timing
from llambo.mesh.security.keyring import ISSUED, Folder
from llambo.testing.mesh import Mesh, key_folder
from llambo.worker.config import FakeOptions

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "python.md"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8") + PAGE.read_text(encoding="utf-8")
WRITTEN = re.sub(r"<!-- generated: .*?<!-- /generated -->", "", TEXT, flags=re.DOTALL)
EXAMPLES = re.findall(r"```python\n(.*?)```", WRITTEN, re.DOTALL)
LOCAL = "tcp://127.0.0.1:7330"
DEADLINE_S = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return key_folder(tmp_path_factory.mktemp("keys") / "keys", me="client")


@pytest.fixture(scope="module")
def mesh(folder: Folder) -> Iterator[Mesh]:
    # Refusals are not deferred, as they are when a broker has just started.
    with Mesh(
        2, fake=FakeOptions(tokens_per_s=2_000), config=BrokerConfig(timing=Timing(startup_grace_ms=0)), keys=folder
    ) as mesh:
        reranks = FakeOptions(tokens_per_s=2_000, kind="rerank")
        mesh.worker_config = replace(mesh.worker_config, model="rank", fake=reranks)
        mesh.spawn("rank").first_line()
        yield mesh


@pytest.fixture
def address(mesh: Mesh, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The mesh as its user has it: a key in this folder, and an environment that names both."""
    shutil.copy(folder.path / ISSUED / "me.key", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMBO_BROKER", mesh.address)
    monkeypatch.setenv("LLAMBO_KEY", "me.key")
    return mesh.address


def test_each_example_of_the_page_runs(address: str) -> None:
    assert len(EXAMPLES) > 12
    names: dict[str, Any] = {"Client": Client, "asyncio": asyncio}
    with SyncClient() as client:
        assert client.address == address
        for example in EXAMPLES:
            names["client"] = client
            try:
                run(example.replace(LOCAL, address), names)
            except Exception as error:
                raise AssertionError(f"this example fails:\n{example}") from error
    assert names["answer"].text


def run(example: str, names: dict[str, Any]) -> None:
    code = compile(example, str(PAGE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if not code.co_flags & inspect.CO_COROUTINE:
        exec(code, names)
        return

    async def with_a_client() -> None:
        async with asyncio.timeout(DEADLINE_S), Client() as client:
            await eval(code, {**names, "client": client})

    asyncio.run(with_a_client())


def test_the_example_of_a_conversation(address: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "chat.py"), address]
    questions = "What is a llama?\nWhere does it live?\n"
    done = subprocess.run(command, input=questions, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2


def test_without_an_address_the_environment_counts_before_the_key(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Client().address == address
    assert Client("tcp://a:1").address == "tcp://a:1"
    monkeypatch.delenv("LLAMBO_BROKER")
    assert Client().address == LOCAL  # as the key says
    monkeypatch.delenv("LLAMBO_KEY")
    assert Client().address == LOCAL


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(LlamboError, match="no setting 'timeout'"):
        Client(timeout=5)  # type: ignore[call-arg]
