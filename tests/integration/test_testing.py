"""The examples of docs/testing.md, as they are written there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "testing.md"


def examples() -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        names: dict[str, Callable[[], None]] = {}
        exec(compile(block, str(PAGE), "exec"), names)
        found |= {name: value for name, value in names.items() if name.startswith("test_")}
    return found


NAMES = ["test_an_answer", "test_a_conversation", "test_a_worker_that_dies", "test_the_status"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_works(name: str) -> None:
    examples()[name]()


def test_each_example_is_run() -> None:
    assert set(examples()) == set(NAMES)
