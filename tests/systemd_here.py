"""What of systemd there is on this machine, and what becomes of the tests that need more.

Without it they are not there at all, and the head of the run says so: nobody has to install systemd to work on a mesh.
Where TESTS_REQUIRE_SYSTEMD is set, as in CI, they are there whatever is missing, and fail.
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
    """Hosts of our own, each with a service manager and a door for ssh."""
    missing = [name for name in ("ssh", SSHD) if shutil.which(name) is None]
    if missing and not os.environ.get(REQUIRED):
        return f"there is no {missing[0]}"
    return hindrance_to_run()


def report() -> list[str]:
    said = []
    if why := hindrance_to_analyze():
        said.append(f"no tests of the units by systemd-analyze: {why}")
    if why := hindrance_to_run():
        said.append(f"no tests under a service manager: {why}")
    elif why := hindrance_to_reach():
        said.append(f"no tests of a fleet on hosts that are reached by ssh: {why}")
    return said
