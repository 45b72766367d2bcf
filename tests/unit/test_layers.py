"""Which layers may import which, and what a core must not use."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "llambo"
#: What each layer may import besides itself. `cli` and `testing` are imported by no other layer.
LAYERS = {
    "mesh": set[str](),
    "broker": {"mesh"},
    "worker": {"mesh"},
    "systemd": set[str](),
    "gateway": {"mesh"},
    "fleet": {"mesh"},
    "bridge": {"mesh"},
    "cli": {"mesh", "broker", "worker", "systemd", "gateway", "fleet", "bridge"},
    # It starts commands as processes: it knows their options, and imports none of their code.
    "testing": {"mesh", "broker", "worker", "systemd", "gateway", "fleet", "bridge"},
}
#: Sockets, clocks, random numbers, threads. A core gets what it needs of them as arguments.
WORLD = {
    "asyncio", "datetime", "multiprocessing", "random", "secrets", "select", "signal", "socket", "subprocess",
    "threading", "time", "uuid", "zmq",
}  # fmt: skip
#: What it may not reach through others either: a value it is given may know the host's name, not the time.
FAR_WORLD = {"asyncio", "random", "secrets", "time", "zmq"}
#: In the broker everything but the shell is core.
BROKER_SHELL = {"broker/server.py", "broker/ports.py", "broker/access/zap_handler.py", "broker/report/metrics_http.py"}
#: The Python packages of llama.cpp. Only their library is used, so nothing imports them.
LLAMA_PACKAGES = {"llama_cpp", "xllamacpp"}
#: The one file that declares functions of C, so that one file has to be looked at when llama.cpp changes.
BINDING_FILE = "worker/llama/binding.py"
#: Sizes at which a reader should ask why. A file, function or class that is larger has its reason in `LARGER`.
FILE_LINES = 500
FUNCTION_LINES = 60
CLASS_FIELDS = 15
#: What is larger, and why: "file", "file:function" or "file:Class".
LARGER = {
    "broker/records/registry.py:WorkerEntry": "its session is a field, because several rules read it for each request",
    "broker/records/request.py:Request": "what its submit fixes is a field, because each rule reads some of it",
    "broker/records/state.py:State": "each field is a record of its own; the token path reads the fence in one step",
    "gateway/apis/openai_common.py:OpenAIRequest": "the fields are those of OpenAI's API and llama.cpp's server",
    "gateway/apis/responses.py:ResponsesRequest": "the fields are those of OpenAI's API",
    "gateway/dashboard/watch_core.py:WorkerView": "one map on the wire, whose fields the page reads by name",
    "mesh/client/answer_stream.py:Stream": "its public attributes are what is known of an answer; half of them",
    "mesh/client/request_options.py:Options": "the options of a request, which a caller gives by name",
    "mesh/client/client.py": "the public interface of the client: one method for each thing that it can do",
    "mesh/wire/messages.py": "the protocol: every message is in one file",
    "mesh/wire/messages.py:InferenceRequest": "one message on the wire, whose fields are promised by name",
    "mesh/wire/messages.py:Dispatch": "one message on the wire, whose fields are promised by name",
    "mesh/wire/messages.py:WorkerHeartbeat": "one message on the wire, whose fields are promised by name",
    "mesh/wire/reports.py": "the answers to all queries are in one file",
    "mesh/wire/reports.py:MeshStatus": "one map on the wire, whose fields are promised by name",
    "mesh/wire/reports.py:WorkerRow": "one map on the wire, whose fields are promised by name",
    "mesh/wire/messages.py:Sampling": "one map on the wire, whose fields are promised by name",
}
#: What runs together in one process, besides `mesh`. Names of modules and classes are unique within each.
PROCESSES = ("broker", "worker", "gateway", "fleet", "bridge", "cli")
#: Names that two modules of one process have all the same.
SHARED_NAMES: dict[str, set[str]] = {}
#: Rooms that import each other.
CIRCLES = set[tuple[str, str]]()

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
    assert {"mesh/link/link_core.py", "broker/config.py"} <= set(CORES)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_imports_only_what_is_below_it(name: str) -> None:
    layer = name.split("/")[0]
    used = {dotted.split(".")[1] for dotted in imports(name) if dotted.startswith("llambo.")}
    if layer in ("cli", "testing"):
        # `from llambo import Client`: the public names are for users, and both count as users.
        used &= set(LAYERS)
    assert used <= LAYERS[layer] | {layer}


@pytest.mark.parametrize("name", CORES)
def test_a_core_knows_nothing_of_the_world(name: str) -> None:
    for file in reach(name):
        used = {dotted.split(".")[0] for dotted in imports(file)} & (WORLD if file == name else FAR_WORLD)
        assert not used, f"{name} reaches {', '.join(sorted(used))} through {file}"


def room_of(name: str) -> str:
    """The sub-package a file is in; a file at the root of its layer is a room of its own."""
    return str(Path(name).parent) if name.count("/") > 1 or name.endswith("__init__.py") else name


def all_imports(name: str) -> set[str]:
    """As `imports`, with what only the type checker reads: import-graph tools draw that too."""
    found: set[str] = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_rooms_do_not_import_in_circles() -> None:
    arrows: dict[str, set[str]] = {}
    for name in NAMES:
        targets = {room_of(file) for dotted in all_imports(name) if (file := file_of(dotted))}
        arrows.setdefault(room_of(name), set()).update(targets - {room_of(name)})

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(arrows[start])
        while waiting:
            room = waiting.pop()
            if room not in seen:
                seen.add(room)
                waiting += arrows.get(room, ())
        return seen

    assert len(arrows) > 30
    circles = {(a, b) for a in arrows for b in reachable(a) if a < b and a in reachable(b)}
    assert circles == CIRCLES


def test_only_the_binding_file_loads_a_library() -> None:
    assert not [name for name in NAMES if LLAMA_PACKAGES & {dotted.split(".")[0] for dotted in imports(name)}]
    workers = [name for name in NAMES if name.startswith("worker/")]
    loaders = {
        name for name in workers for node in nodes(name) if isinstance(node, ast.Attribute) and node.attr == "CDLL"
    }
    assert loaders == {BINDING_FILE}


def fields(node: ast.ClassDef) -> int:
    """Attributes declared in the class, and those its `__init__` sets."""
    names = {
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            names |= {
                inner.attr
                for inner in ast.walk(item)
                if isinstance(inner, ast.Attribute)
                and isinstance(inner.ctx, ast.Store)
                and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"
            }
    return len(names)


def larger(name: str) -> Iterator[str]:
    """What in this file is over the size at which a reader should ask why."""
    if len((ROOT / name).read_text(encoding="utf-8").splitlines()) > FILE_LINES:
        yield name
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                yield f"{name}:{node.name}"
        elif isinstance(node, ast.ClassDef) and fields(node) > CLASS_FIELDS:
            yield f"{name}:{node.name}"


def test_what_is_large_has_a_reason() -> None:
    assert {place for name in NAMES for place in larger(name)} == set(LARGER)


@pytest.mark.parametrize("layer", PROCESSES)
def test_a_name_means_one_thing_in_a_process(layer: str) -> None:
    own = {name for name in NAMES if name.split("/")[0] == layer}
    loaded = {file for name in own for file in reach(name) if file.split("/")[0] in ("mesh", layer)}
    assert len(loaded) > len(own)
    homes: dict[str, list[str]] = {}
    for name in loaded:
        # A command's file has the name of the command: that is how `cli/main.py`, and a reader, find it.
        if Path(name).stem not in ("__init__", "__main__") and not name.startswith("cli/commands/"):
            homes.setdefault(f"{Path(name).stem}.py", []).append(name)
        for node in tree(name).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(name)
    assert {key for key, files in homes.items() if len(files) > 1} == SHARED_NAMES.get(layer, set())
