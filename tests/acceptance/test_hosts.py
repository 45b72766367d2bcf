"""Two hosts and a laptop, set up with `llambo keys` as the documentation says, each in a network of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.places import way_in

pytestmark = pytest.mark.needs("ip", "networks")

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180.0


def test_an_answer_over_three_hosts_is_unreadable_in_between(tmp_path: Path) -> None:
    way = way_in()
    assert way is not None
    # When a broker, a worker and a client are on hosts of their own, and all that passes between them is captured
    done = subprocess.run(
        [*way, sys.executable, "-m", "tests.acceptance.hosts", str(tmp_path)],
        cwd=ROOT, check=False, capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    # Then there is an answer, and all that was captured is CURVE, with no plaintext
    assert seen["words"] >= 30, seen
    assert seen["captured"] > 20_000
    assert seen["curve"]
    assert seen["plaintext"] == []
    # And a client without a key gets an error that names the key
    status, text = seen["stranger"]
    assert status in (3, 9)
    assert "key" in text
