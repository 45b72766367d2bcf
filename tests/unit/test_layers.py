"""Who may import whom, and what a core may know of the world."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What each layer may import besides itself. `cli` is imported by nobody.
LAYERS = {
    "mesh": set[str](),
    "broker": {"mesh"},
    "worker": {"mesh"},
    "systemd": set[str](),
    "gateway": {"mesh"},
    "fleet": {"mesh"},
    "bridge": {"mesh"},
    "cli": {"mesh", "broker", "worker", "systemd", "gateway", "fleet", "bridge"},
}
#: The world: sockets, clocks, chance, threads. A core is given what it needs of it.
WORLD = {
    "asyncio",
    "datetime",
    "multiprocessing",
    "random",
    "secrets",
    "select",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
    "uuid",
    "zmq",
}
#: What it may not reach through others either: a value it is given may know the host's name, not the time.
FAR_WORLD = {"asyncio", "random", "secrets", "time", "zmq"}
#: In the broker everything but the shell is core.
BROKER_SHELL = {"broker/server.py", "broker/ports.py", "broker/porter.py", "broker/window.py"}
#: A file is read in one sitting.
FILE_LINES = 350
#: All that knows llama.cpp's bindings is in one file, so that one file has to be looked at when they change.
LONGER = {"worker/llama.py": 600}
BINDINGS = "llama_cpp"

FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
CORES = [
    name
    for name in NAMES
    if "core" in Path(name).stem.split("_") or (name.startswith("broker/") and name not in BROKER_SHELL)
]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def nodes(name: str) -> Iterator[ast.AST]:
    """All of a file but what only the type checker reads."""
    waiting: list[ast.AST] = [tree(name)]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting.extend(node.orelse)
        else:
            waiting.extend(ast.iter_child_nodes(node))


def imports(name: str) -> set[str]:
    """The dotted names a file imports; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: say llambo.{name.split('/')[0]}, not a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_of(dotted: str) -> str | None:
    """The file of ours that `llambo.x.y` or `llambo.x.y.NAME` comes from."""
    parts = dotted.split(".")
    for end in (len(parts), len(parts) - 1):
        for name in ("/".join(parts[1:end]) + ".py", "/".join([*parts[1:end], "__init__.py"])):
            if parts[0] == "llambo" and end > 1 and name in NAMES:
                return name
    return None


def reach(name: str) -> set[str]:
    """The file and every file of ours that it imports, directly or not."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [file for dotted in imports(name) if (file := file_of(dotted))]
    return seen


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 20
    assert {"mesh/link_core.py", "broker/config.py"} <= set(CORES)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_imports_only_what_is_below_it(name: str) -> None:
    layer = name.split("/")[0]
    used = {dotted.split(".")[1] for dotted in imports(name) if dotted.startswith("llambo.")}
    if layer == "cli":
        # `from llambo import Client`: the public door is for those outside, and commands count as that.
        used &= set(LAYERS)
    assert used <= LAYERS[layer] | {layer}


@pytest.mark.parametrize("name", CORES)
def test_a_core_knows_nothing_of_the_world(name: str) -> None:
    for file in reach(name):
        used = {dotted.split(".")[0] for dotted in imports(file)} & (WORLD if file == name else FAR_WORLD)
        assert not used, f"{name} reaches {', '.join(sorted(used))} through {file}"


def test_one_file_imports_llama_cpp() -> None:
    users = [name for name in NAMES if any(dotted.split(".")[0] == "llama_cpp" for dotted in imports(name))]
    assert len(users) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_file_can_be_read_in_one_sitting(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= LONGER.get(name, FILE_LINES)


def test_one_file_knows_llama_cpp() -> None:
    assert [name for name in NAMES if any(dotted.split(".")[0] == BINDINGS for dotted in imports(name))] == list(LONGER)
