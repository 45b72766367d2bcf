"""Which parts of systemd this machine has. Tests that need a missing part are not collected.

The header of the test run lists what is missing, so that systemd is no condition for work on a mesh.
With TESTS_REQUIRE_SYSTEMD set, as in CI, they are collected whatever is missing, and fail.
"""

from __future__ import annotations

import os
import shutil
from functools import cache

from tests.integration.manager import hindrance

REQUIRED = "TESTS_REQUIRE_SYSTEMD"
SSHD = "/usr/sbin/sshd"


@cache
def hindrance_to_analyze() -> str:
    missing = shutil.which("systemd-analyze") is None and not os.environ.get(REQUIRED)
    return "there is no systemd-analyze" if missing else ""


@cache
def hindrance_to_run() -> str:
    return "" if os.environ.get(REQUIRED) else hindrance()


@cache
def hindrance_to_reach() -> str:
    """What the hosts of a test need: a service manager and an ssh server each."""
    missing = [name for name in ("ssh", SSHD) if shutil.which(name) is None]
    if missing and not os.environ.get(REQUIRED):
        return f"there is no {missing[0]}"
    return hindrance_to_run()


def report() -> list[str]:
    lines = []
    if why := hindrance_to_analyze():
        lines.append(f"no tests of the units by systemd-analyze: {why}")
    if why := hindrance_to_run():
        lines.append(f"no tests under a service manager: {why}")
    elif why := hindrance_to_reach():
        lines.append(f"no tests of a fleet on hosts that are reached by ssh: {why}")
    return lines
