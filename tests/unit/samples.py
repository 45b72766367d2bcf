"""One full sample of every message, and the golden vectors made from them.

    python -m tests.unit.samples --write     after a deliberate change of the protocol

A changed vector is a changed protocol: then a released version no longer understands this one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import msgpack
import msgspec

from llambo.mesh.wire import codec, tokens
from llambo.mesh.wire import messages as m
from llambo.mesh.wire.errors import Code, ErrorInfo

GOLDEN = Path(__file__).parent / "golden" / "messages.json"

ID = bytes(range(16))
DISPATCH = b"\x00\x00\x00\x02wxyz"
KEY = ID + DISPATCH
SESSION = b"session!"
TOPIC = bytes(range(100, 116))
LOGPROBS = [
    tokens.Logprob(-0.5, [tokens.TopToken(11, b"Hi", -0.5), tokens.TopToken(12, b"Ho", -2.25)]),
    tokens.Logprob(-3.0),
]
CHUNK = tokens.encode_chunk(KEY, 7, [11, 2**31], [b"Hi", "\u00e9".encode()[:1]], tokens.FINAL)
CHUNK_WITH_LOGPROBS = tokens.encode_chunk(KEY, 7, [11, 2**31], [b"Hi", b"!"], 0, LOGPROBS)
BEAT = tokens.encode_beat(2**33, SESSION)
ERROR = ErrorInfo(Code.BUSY, "the queue is full", 250)
MODELS = [m.ModelInfo("tiny", "f00d", 2_048, "embed")]
HOSTED = m.HostedModel(
    "tiny", "embed", "failed", 41, {"ram": 2**30}, "box-1-tiny", True, ["alice/x"], 4_000, 3, "out of memory", 5_000,
    ["pirate"],
)  # fmt: skip
TICKET = bytes(range(16))
HOSTED_FILE = m.HostedFile("hf:org/tiny", "fetching", 2**20, 2**30, 2**19, "checking", 7, ["box-9"])
SOURCE = m.FileSource("box-2", "tcp://10.0.0.2:7340", TICKET, "k" * 40)
FILE_ORDER = m.FileOrder("hf:org/tiny", True, True, [SOURCE], 7)
#: {"temperature": 0.5, "stop": ["\n"]}
SAMPLING = msgspec.Raw(msgspec.msgpack.encode({"temperature": 0.5, "stop": ["\n"]}))
DISPATCHED = m.Dispatch(
    ID, DISPATCH, 17, "tiny", 99, 2**62, [1, 2, 2**31], 5, 5_000, False, "batch", True, SAMPLING, 5, "embed",
    3, "laptop", b"sealed!",
)  # fmt: skip
REQUESTED = m.InferenceRequest(
    ID, "tiny", 99, False, "batch", 60_000, True, 2**62, 7, True, 5, "sha256:1", SAMPLING, 5, "embed", b"proof!",
)  # fmt: skip

#: By direction, and then by name. No field of a sample has its default, so that each is seen on the wire.
SAMPLES: dict[str, list[m.Message]] = {
    "client": [
        m.ClientHello((1, 2), "laptop", "llambo 0.1.0", b"incarnat"),
        m.ClientHeartbeat(41),
        REQUESTED,
        m.Attach(ID, 12, [CHUNK], True, "f00d"),
        m.Detach(ID),
        m.Cancel(ID, DISPATCH),
        m.Replay(ID, 3, 9, DISPATCH),
        m.EndAck([ID, KEY]),
        m.Query(5, "why", "0001"),
        m.DrainWorker(6, "w-1", True, True),
        m.HoldModel(8, "tiny", "box-1", "editor", 60_000, True, True),
        m.PullModel(9, "hf:org/tiny", "gpu", True),
        m.Lease(7, "fleet", bytes(range(8)), 3_000, True, ["llama@tiny"], ["spawned 2 tiny"]),
        m.Goodbye("done"),
    ],
    "to_client": [
        m.Welcome(SESSION, 7333, TOPIC, 2, "b-1", 300, 3_000, True, 5_000),
        m.BrokerHeartbeat(42, 41, {ID: 9}, {ID: 3}, 17, {ID: "loading tiny on box-1, 41 %"}, 300, 5_000, True),
        m.Accepted(ID, 4, "tiny", "sha256:1", b"proof!"),
        m.End(ID, 99, "length", DISPATCH, m.Usage(10, 4, 1.5, 2.5), ERROR, "w-1", 2, 33, "###"),
        m.Page(ID, 7, 9, 12, [CHUNK], DISPATCH),
        m.Result(5, 0, 1, msgpack.packb({"a": 1})),
        m.Problem(ERROR, ID, 5),
    ],
    "worker": [
        m.WorkerHello(
            "w-1",
            b"incarnat",
            MODELS,
            8,
            (1, 2),
            "0.1.0",
            "gpu",
            "host-1",
            77,
            "starting",
            "lib 1",
            True,
            True,
        ),
        m.WorkerHeartbeat(
            17, 41, {KEY: 9}, 3, "draining", 12.5, "loading", 2, 43, MODELS, 8, 4.25, True, True, True, "lib 1"
        ),
        m.Accept(ID, DISPATCH),
        m.Reject(ID, DISPATCH, ERROR, True),
        m.EngineLost([KEY], "signal 11", [9], True),
        m.Orphan(DISPATCHED, True),
    ],
    "to_worker": [
        DISPATCHED,
        m.Adopt(ID, DISPATCH, 18),
        m.Drain(True, True),
    ],
    "host": [
        m.HostHello("box-1", b"incarnat", (1, 2), "0.1.0", "gpu", "host-1", 77, "tcp://10.0.0.1:7340", True),
        m.HostHeartbeat(17, 3, [HOSTED], {"ram": m.Memory(2**34, 2**30, 2**31)}, [HOSTED_FILE]),
    ],
    "to_host": [
        m.PlaceModels(18, ["tiny"], ["large"]),
        m.Hold(19, "tiny", "alice/editor", 60_000, True, True),
        m.FetchFiles(20, [FILE_ORDER], [m.FileGrant(TICKET, "hf:org/tiny", "k" * 40)]),
    ],
}

CODECS: dict[str, tuple[codec.Codec[Any], Any]] = {
    "client": (codec.from_client, m.ClientToBroker),
    "to_client": (codec.to_client, m.BrokerToClient),
    "worker": (codec.from_worker, m.WorkerToBroker | m.HostToBroker),
    "to_worker": (codec.to_worker, m.BrokerToWorker),
    "to_host": (codec.to_host, m.BrokerToHost),
}

ALL: list[m.Message] = [sample for samples in SAMPLES.values() for sample in samples]


def allowed(direction: str) -> list[m.Message]:
    """Samples of everything that may be sent in this direction."""
    known = get_args(CODECS[direction][1])
    return [sample for sample in ALL if type(sample) in known]


def frames_of(sample: m.Message) -> list[bytes]:
    blob = b"What is AI?" if type(sample) in m.WITH_BLOB else None
    return codec.encode(SESSION, [(sample, blob)])


def plain(value: Any) -> Any:
    """What an independent msgpack reader decodes, in a form that JSON can hold."""
    match value:
        case bytes():
            return f"0x{value.hex()}"
        case dict():
            return {str(plain(key)): plain(item) for key, item in value.items()}
        case list():
            return [plain(item) for item in value]
        case _:
            return value


def vectors() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for sample in ALL:
        frames = frames_of(sample)
        body = msgpack.unpackb(frames[1], strict_map_key=False)
        found[type(sample).__name__] = {"frames": [frame.hex() for frame in frames], "body": plain(body)}
    found["chunk"] = {"frames": [CHUNK.hex()]}
    found["chunk with logprobs"] = {
        "frames": [CHUNK_WITH_LOGPROBS.hex()],
        "body": plain(msgpack.unpackb(CHUNK_WITH_LOGPROBS[tokens.HEAD_BYTES :])),
    }
    found["beat"] = {"frames": [BEAT.hex()]}
    return found


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    GOLDEN.write_text(json.dumps(vectors(), indent=1) + "\n", encoding="utf-8")
