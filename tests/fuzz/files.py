"""Targets that are read from files, from the command line, and by people's programs."""

from __future__ import annotations

import base64
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import zmq

from bench import tiny_model
from llambo.mesh.client.task_results import decoded
from llambo.mesh.link import sockets
from llambo.mesh.security import keyring, keys
from llambo.mesh.settings import settings, settings_table
from llambo.mesh.wire import messages as m
from llambo.mesh.wire import tasks
from llambo.mesh.wire.errors import LlamboError
from llambo.mesh.wire.identity import Identity, Pair, PeerKey
from llambo.worker.config import LlamaOptions
from llambo.worker.llama import grammar, prompt
from llambo.worker.models import gguf, model_files
from tests.fuzz.mutator import Mutator, pack
from tests.fuzz.target import Frames, Target, plain


def results() -> Target:
    """Results of tasks and answers to queries, as a client reads them."""
    kinds: list[Any] = [
        tasks.TokenizeResult,
        tasks.DetokenizeResult,
        tasks.EmbedResult,
        dict[str, Any],
        list[dict[str, Any]],
    ]
    good = [
        msgspec.msgpack.encode(tasks.TokenizeResult([1, 2], [b"a", b"b"])),
        msgspec.msgpack.encode(tasks.DetokenizeResult(b"text")),
        msgspec.msgpack.encode(tasks.EmbedResult(2, "mean", True, [3, 4], bytes(16))),
    ]
    values = {frame: msgpack.unpackb(frame) for frame in good}

    def run(frames: Frames) -> None:
        for kind in kinds:
            try:
                found = decoded(frames[0], kind, "it")
            except LlamboError:
                continue
            if isinstance(found, tasks.EmbedResult):
                with suppress(ValueError):
                    tasks.vectors_of(found)

    def mutate(mutator: Mutator, frames: Frames) -> Frames:
        if mutator.chance.random() < 0.3:
            return [mutator.mangled(frames[0]) if mutator.chance.random() < 0.9 else mutator.tower()]
        return [pack(mutator.value(values[frames[0]]))]

    return Target("results", [[frame] for frame in good], run, mutate)


def settings_files() -> Target:
    """A configuration file; what the environment and flags say goes through the same parsers."""
    toml = "\n".join(
        f"[{section}]\n" + "\n".join(f"{key} = {_toml(setting.default)}" for key, setting in sorted(rows.items()))
        for section, rows in sorted(settings_table.SECTIONS.items())
    ).encode()
    file = _file("llambo.toml")

    def run(frames: Frames) -> None:
        file.write_bytes(frames[0])
        with suppress(LlamboError):
            settings.load(config=str(file), environ={})
        text = frames[0][:80].decode(errors="replace").replace("\0", "")
        for row in settings.TABLE[len(frames[0]) % 7 :: 7]:
            try:
                row.parse(text)
            except ValueError:
                continue

    lines = toml.splitlines()
    return Target("settings", [[b"\n".join(lines[at : at + 12])] for at in range(0, len(lines), 12)], run, plain)


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def addresses() -> Target:
    def run(frames: Frames) -> None:
        text = frames[0].decode(errors="surrogateescape")
        try:
            for host, _ in sockets.split_all(text):
                sockets.is_loopback(host)
                sockets.literal(host)
        except LlamboError:
            return

    good = [b"tcp://127.0.0.1:7330", b"tcp://[::1]:7330,tcp://b.example:1", b"localhost", b"tcp://h%eth0:65535"]
    return Target("addresses", [[text] for text in good], run, plain)


def gguf_files() -> Target:
    """The head of a model file, and how it is laid out."""
    path = _file("model.gguf")
    head = tiny_model.whole()[:8192]
    seeds = [[head]] + [[tiny_model.mutant(seed)[1][:8192]] for seed in range(30)]

    def run(frames: Frames) -> None:
        path.write_bytes(frames[0])
        try:
            found = gguf.read(str(path))
            model_files.layout(LlamaOptions(), found, 2**34, 4)
            found.template.encode(errors="replace")
        except gguf.BadModelFile:
            return

    return Target("model-files", seeds, run, plain)


def grammars() -> Target:
    """Grammars, schemas and messages, as the engine reads them first."""
    good = [b'{"type":"object","properties":{"a":{"type":"string","maxLength":9}}}', b'root ::= ("a" | [^b\\]]*) # x\n',
            b'[{"role":"user","content":"hello"},{"role":"assistant","content":"x"}]',
            b'{"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]},{"role":"tool","content":"1"}],"tools":[]}',
            b'{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}]}',
            b'{"messages":[{"role":"user","content":""}],"tools":[{"function":{"name":"f","parameters":{"properties":{}}}}]}',
            b'{"type":"object","properties":{"a":{"pattern":"^[a-c]{2}$"}}}']  # fmt: skip

    def run(frames: Frames) -> None:
        text = frames[0].decode(errors="replace")
        for options in (m.Sampling(grammar=text), m.Sampling(json_schema=text)):
            try:
                grammar.grammar_of(options)
            except grammar.GrammarError:
                continue
        for form in ("messages", "chat", "user", "text"):
            try:
                request = prompt.chat_of(frames[0], m.Sampling(form=form))
                prompt.prompt_text(frames[0], request, None)
            except prompt.BadPrompt:
                continue
            try:
                grammar.grammar_of(m.Sampling(tool_choice="auto"), request.tools)
            except grammar.GrammarError:
                continue

    return Target("grammars-and-messages", [[text] for text in good], run, plain)


def _pair() -> Pair:
    """The same in each run, or its findings could not be repeated. It is an example of ZeroMQ's and opens nothing."""
    secret = "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6"
    return Pair(zmq.curve_public(secret.encode()).decode(), secret)


def key_lines() -> Target:
    """A key as a person pastes it: refused like any other text that is none, and never repeated."""
    pair = _pair()
    key = PeerKey("tcp://127.0.0.1:7330", pair.public, "laptop", "client", pair)
    line = keys.to_line(key)
    good = json.loads(base64.urlsafe_b64decode(line.removeprefix(keys.PREFIX) + "=="))

    def run(frames: Frames) -> None:
        text = frames[0].decode(errors="surrogateescape")
        problem = ""
        try:
            found = keys.from_line(text)
        except LlamboError as error:
            problem = error.text
        if problem:
            assert pair.secret not in problem, "a secret key in an error"
            return
        assert keys.from_line(keys.to_line(found)) == found
        assert found.pair.secret not in repr(found.pair), "a secret key that shows itself"

    def mutate(mutator: Mutator, frames: Frames) -> Frames:
        if mutator.chance.random() < 0.4:
            return [mutator.mangled(frames[0])]
        changed = _jsonable(mutator.value(good))
        return [(keys.PREFIX + base64.urlsafe_b64encode(json.dumps(changed).encode()).decode().rstrip("=")).encode()]

    return Target("key-lines", [[line.encode()]], run, mutate)


def keyrings() -> Target:
    """The file that lists who may connect."""
    pair = _pair()
    limited = Identity("c", "client", 3, 9, 1_000, 60, "normal", ("tiny*",))
    entries = [keyring.KeyEntry(pair.public, limited, 7, 2**40), keyring.KeyEntry(pair.public, Identity("w", "worker"))]
    good = msgspec.json.encode(keyring.Ring(1, "tcp://127.0.0.1:7330", entries))
    document = json.loads(good)
    path = _file("keyring.json")
    path.parent.joinpath(keyring.RING_FILE).touch(0o600)
    folder = keyring.Folder(path.parent)

    def run(frames: Frames) -> None:
        path.write_bytes(frames[0])
        try:
            ring = folder.ring()
        except LlamboError:
            return
        for now_s in (0.0, 1e12):
            for public, identity in ring.identities(now_s).items():
                assert len(public) == keys.Z85_CHARS
                _ = (
                    identity.may_ask,
                    identity.may_serve,
                    identity.may_manage,
                    identity.may_use("tiny"),
                    identity.owns("x"),
                )
                identity.may_come_as("batch")

    def mutate(mutator: Mutator, frames: Frames) -> Frames:
        if mutator.chance.random() < 0.4:
            return [mutator.mangled(frames[0])]
        return [json.dumps(_jsonable(mutator.value(document))).encode()]

    return Target("keyrings", [[good]], run, mutate)


def _jsonable(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _jsonable(each) for key, each in value.items()}
        case list():
            return [_jsonable(each) for each in value]
        case bool() | int() | float() | str() | None:
            return value
        case _:
            return repr(value)


def _file(name: str) -> Path:
    """A file in memory, where there is such a place; gone when this process is."""
    folder = tempfile.TemporaryDirectory(prefix="llambo-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    _folders.append(folder)
    return Path(folder.name, name)


_folders: list[tempfile.TemporaryDirectory[str]] = []


def every() -> list[Target]:
    return [results(), settings_files(), addresses(), key_lines(), keyrings(), gguf_files(), grammars()]
