"""docs/python.md has all that `llambo` exports, and nothing else; `SyncClient` has what `Client` has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import llambo
from docs import python_parts

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
REFERENCE = "\n".join(re.findall(r"<!-- generated: python-.*?<!-- /generated -->", PAGE, re.DOTALL))
#: Beside classes that are exported: of Python, of pyzmq, and the key, for which the path of its file is enough.
OTHER_TYPES = {
    *("Any", "Callable", "None", "Sequence", "bool", "bytes", "dict", "float", "int", "list", "str"),
    *("Context", "PeerKey"),
}


def public(kind: type) -> set[str]:
    """What a program can use of it: its methods and properties, and the attributes that are documented."""
    return {name for name in vars(kind) if not name.startswith("_")} | set(python_parts.attributes(kind))


def test_every_export_has_a_section() -> None:
    sections = re.findall(r"^### (\w+)$", REFERENCE, re.MULTILINE)
    assert len(sections) == len(set(sections))
    assert {*sections, "Messages", "__version__"} == set(llambo.__all__)
    assert "`Messages` is" in PAGE


def test_every_type_that_is_named_is_exported() -> None:
    signatures = re.findall(r"```python\n(.*?)\n```", REFERENCE, re.DOTALL)
    assert len(signatures) > 25
    types = [part for each in signatures for part in re.findall(r"(?:: |-> )([^=]*?)(?= = |, \w+:|, \*|\)|$)", each)]
    rows = re.findall(r"^\| `[\w.]+` \| `([^`]*)` \|", REFERENCE, re.MULTILINE)
    assert len(rows) > 150
    named = {name for each in [*types, *rows] for name in re.findall(r'(?<!")\b[A-Za-z]\w*\b(?!")', each)}
    assert named - OTHER_TYPES <= set(llambo.__all__)


def test_nothing_private_and_nothing_empty_is_shown() -> None:
    assert not re.findall(r"`(?:\w+\.)?_\w+", REFERENCE)
    assert not re.findall(r"^\| `.*\|  \|$", REFERENCE, re.MULTILINE), "a field without a `#:` comment above it"
    assert not re.findall(r"^```\n\n(?=\n|```|\|)", REFERENCE, re.MULTILINE), "a method without a docstring"


@pytest.mark.parametrize(
    ("kind", "base", "renamed"),
    [
        # These are called in the thread of the client, where a program without asyncio has nothing to do.
        (llambo.SyncClient, llambo.Client, {"on_wait"}),
        (llambo.SyncStream, llambo.Stream, {"aclose", "on_place"}),
    ],
)
def test_the_client_without_asyncio_has_the_same(kind: type, base: type, renamed: set[str]) -> None:
    assert public(base) - public(kind) == renamed
    for name in public(base) & public(kind):
        one, other = vars(kind).get(name), vars(base).get(name)
        if inspect.isfunction(one) and inspect.isfunction(other):
            assert parameters(one) == parameters(other), name


def parameters(function: Any) -> list[tuple[str, Any]]:
    return [(each.name, each.default) for each in [*inspect.signature(function).parameters.values()][1:]]


def test_a_type_is_shown_the_same_in_every_version_of_python() -> None:
    assert python_parts.signature("client.attach", llambo.Client.attach) == (
        "await client.attach(id: str, *, tools: bool = False) -> Stream"
    )
    assert python_parts.fields(llambo.Options)["form"] == '"text" | "user" | "messages" | "chat" | None'
    assert python_parts.fields(llambo.Options)["tools"] == "Messages | None"
    assert python_parts.fields(llambo.RequestStory)["story"] == "list[StoryStep]"
