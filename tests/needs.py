"""What some tests need, by name: a program of `tools/needs.py`, or something that not every machine allows.

    pytestmark = pytest.mark.needs("systemd", "manager")

Without it the test is skipped, and the last line of the run counts how many were, and says what to install. In CI a
test that is skipped is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec

import pytest

from llambo.worker.llama import binding
from tests.chaos.places import way_in
from tests.integration.manager import hindrance
from tools.needs import BY_NAME, install_command

MARK = "needs"


@cache
def _networks() -> str:
    return "" if way_in() else "this machine allows no networks of our own"


def _native() -> str:
    return "" if find_spec("llama_cpp") else "the extra llama-native is not installed"


def _hub() -> str:
    return "" if find_spec("huggingface_hub") else "huggingface_hub is not installed: make dev"


def _two_libraries() -> str:
    return "" if len(binding.installed()) > 1 else "the extras llama and llama-native are not both installed"


#: What is no program: why it cannot be had; empty, it can.
CONDITIONS: dict[str, Callable[[], str]] = {
    "huggingface_hub": _hub, "llama-native": _native, "manager": hindrance, "networks": _networks,
    "two-libraries": _two_libraries,
}  # fmt: skip


def skip_without(item: pytest.Item) -> None:
    """Skip the test if one of its needs cannot be had, and note which."""
    for mark in item.iter_markers(MARK):
        for name in mark.args:
            if reason := _missing(name):
                item.user_properties.append((MARK, name))
                item.add_marker(pytest.mark.skip(reason=reason))
                return


def _missing(name: str) -> str:
    need = BY_NAME.get(name)
    if need is None:
        return CONDITIONS[name]()
    return "" if need.is_there() else f"there is no {name}"


def count(skipped: Iterable[pytest.TestReport]) -> str:
    """The last line of a run; empty if every test has run."""
    counts = Counter(name for report in skipped for mark, name in report.user_properties if mark == MARK)
    if not counts:
        return ""
    total = counts.total()
    each = ", ".join(f"{number} need{'s' if number == 1 else ''} {name}" for name, number in counts.most_common())
    programs = [BY_NAME[str(name)] for name in counts if name in BY_NAME]
    command = f"; install: {install_command(programs)}" if programs else ""
    return f"{total} test{' was' if total == 1 else 's were'} skipped: {each}{command}"
