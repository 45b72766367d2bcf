"""schemathesis over the gateway's OpenAPI document: generated requests, and no server error.

Here some hundred of them; `SCHEMA_EXAMPLES=600` makes it more than 10,000, in some minutes:

    SCHEMA_EXAMPLES=600 python -m pytest -s tests/integration/test_gateway_schema.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from llambo.testing.mesh import Mesh
from llambo.worker.config import FakeOptions
from tests.integration.gateway_process import GatewayProcess

#: Of each path and method, and of what follows from it.
EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "4"))
#: Each reply is no server error, has a status and a type of the document, and conforms to its schema.
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
#: The tour through what a document says of each field is long; a short run goes without it.
PHASES = "fuzzing,stateful" if EXAMPLES < 100 else "coverage,fuzzing,stateful"
RUN_S = 60 + 5 * EXAMPLES


def test_no_request_is_a_server_error(tmp_path: Path) -> None:
    with Mesh(2, fake=FakeOptions(slots=8, answer_tokens=20)) as mesh, GatewayProcess(mesh.address) as gateway:
        words = [f"{gateway.url}/openapi.json", "--max-examples", str(EXAMPLES), "--phases", PHASES, "--checks", CHECKS,
                 "--seed", "1", "--no-color", "--continue-on-failure", "--max-failures", "20",
                 "--request-timeout", "60"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())",
             "run", *words],
            capture_output=True, text=True, timeout=RUN_S, check=False, cwd=tmp_path,
        )  # fmt: skip
        print(done.stdout[-20_000:])
        assert done.returncode == 0, done.stderr[-2_000:]
        cases = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
        assert cases is not None and int(cases[1]) == int(cases[2]) >= 12 * EXAMPLES
        assert gateway.get("/readyz") == {"status": "ok"}
        # Whatever was asked, no client reads it any more.
        mesh.until(lambda core: not core.state.requests, "nothing runs on")
