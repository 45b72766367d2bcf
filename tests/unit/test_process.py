"""The limits a broker asks the kernel for at its start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PREPARED = """
import json, resource
from llambo.cli.services.service import disable_core_dumps, raise_descriptor_limit

resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
disable_core_dumps()
raise_descriptor_limit()
print(json.dumps([resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


@pytest.mark.parametrize("hard", [64, 200])
def test_no_cores_and_as_many_connections_as_there_may_be(hard: int) -> None:
    out = subprocess.run([sys.executable, "-c", PREPARED.format(hard=hard)], capture_output=True, check=True)
    assert json.loads(out.stdout) == [[0, 0], [hard, hard]]
