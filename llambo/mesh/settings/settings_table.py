"""The table of all settings: one row for each is a flag, an environment variable and a key of `llambo.toml`.

A setting has the same name everywhere: `queue_bytes` under `[broker]` in the file is `--queue-bytes` on the command
line and `LLAMBO_QUEUE_BYTES` in the environment. A row whose names differ from that names them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

Value = str | int | float | bool

MIB = 1024 * 1024
#: A value that begins like this is a key itself. It is never shown.
KEY_PREFIX = "llambo-key-"
_BYTE_UNITS = {"": 1, "B": 1, "KIB": 1024, "MIB": MIB, "GIB": 1024 * MIB}
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Kind(Enum):
    """The type of a value; the text is the placeholder in `--help`."""

    TEXT = "TEXT"
    NUMBER = "NUMBER"
    AUTO = "auto|NUMBER"
    REAL = "REAL"
    MS = "MS"
    BYTES = "BYTES"
    SWITCH = "YES/NO"
    KEY = "FILE|LINE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table. `key` is its name in its section of the file."""

    name: str
    section: str
    kind: Kind
    default: Value
    help: str
    roles: frozenset[str]
    key: str
    flag: str
    env: str
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = math.inf

    @property
    def metavar(self) -> str:
        return "|".join(self.choices) or self.kind.value

    def parse(self, raw: Any) -> Value:
        """The value of `raw`, which is typed (from a file) or text. ValueError names what was expected."""
        value = _PARSERS[self.kind](raw)
        if self.choices and value not in self.choices:
            raise ValueError(f"expected one of {', '.join(self.choices)}")
        if not isinstance(value, str) and not self.low <= value <= self.high:
            raise ValueError(f"expected {self._range()}")
        return value

    def show(self, value: Value) -> str:
        """The value as a person would write it in `llambo.toml`."""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if self.kind is Kind.KEY and str(value).startswith(KEY_PREFIX):
            return "(a key)"
        if self.kind is Kind.BYTES and isinstance(value, int):
            return _show_bytes(value)
        return str(value)

    def _range(self) -> str:
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:.12g}"


# --- reading values ----------------------------------------------------------------------------------


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise ValueError("expected text")
    return raw


def _whole(raw: Any, what: str = "a whole number") -> int:
    try:
        if isinstance(raw, str):
            return int(raw)
    except ValueError:
        pass
    # True is an int in Python, but `port = true` is a mistake.
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    raise ValueError(f"expected {what}")


def _auto(raw: Any) -> str | int:
    return "auto" if raw == "auto" else _whole(raw, "auto or a whole number")


def _real(raw: Any) -> float:
    try:
        if isinstance(raw, (str, int, float)) and not isinstance(raw, bool) and math.isfinite(float(raw)):
            return float(raw)
    except (ValueError, OverflowError):
        pass
    raise ValueError("expected a number")


def _switch(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in _YES + _NO:
        return raw.lower() in _YES
    raise ValueError("expected yes or no")


def _bytes(raw: Any) -> int:
    if isinstance(raw, str):
        found = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", raw)
        if found and found[2].upper() in _BYTE_UNITS:
            return int(found[1]) * _BYTE_UNITS[found[2].upper()]
    return _whole(raw, "a size such as 65536, 512KiB, 64MiB or 2GiB")


def _show_bytes(value: int) -> str:
    for unit, size in (("GiB", 1024 * MIB), ("MiB", MIB), ("KiB", 1024)):
        if value and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)


_PARSERS: dict[Kind, Callable[[Any], Value]] = {
    Kind.TEXT: _text,
    Kind.NUMBER: _whole,
    Kind.AUTO: _auto,
    Kind.REAL: _real,
    Kind.MS: lambda raw: _whole(raw, "a whole number of milliseconds"),
    Kind.BYTES: _bytes,
    Kind.SWITCH: _switch,
    Kind.KEY: _text,
}


# --- writing rows ------------------------------------------------------------------------------------


def row(
    where: str,
    kind: Kind,
    default: Value,
    text: str,
    *,
    roles: str = "",
    name: str = "",
    env: str = "",
    flag: str = "",
    choices: tuple[str, ...] = (),
    low: float = 0,
    high: float = math.inf,
) -> Setting:
    """`where` is "section.key"; the rest is derived from it unless it is given."""
    section, key = where.split(".")
    if section == "fake":
        # Where there are no sections, its name needs a prefix: it could be one of the llama.cpp engine.
        name, flag, roles = f"fake_{key}", f"fake_{key}", "worker"
    name = name or key
    return Setting(
        name=name,
        section=section,
        kind=kind,
        default=default,
        help=text,
        roles=frozenset((roles or section).split()),
        key=key,
        flag="--" + (flag or key).replace("_", "-"),
        env="LLAMBO_" + (env or name).upper(),
        choices=choices,
        low=low,
        high=high,
    )


# --- the table ---------------------------------------------------------------------------------------

#: Longest duration: about a month, which catches a value given in microseconds.
_LONGEST_MS = 31 * 86_400_000
_ALL = "broker worker client gateway"
_POLICIES = ("least-loaded", "round-robin", "random")
_LOG_LEVELS = ("debug", "info", "warning", "error")

_MESH = (
    row("mesh.broker", Kind.TEXT, "tcp://127.0.0.1:7330", "address of the broker; several are separated by commas",
        roles="worker client gateway"),
    row("mesh.key", Kind.KEY, "", "key to show to the broker: a file, or the line itself",
        roles="worker client gateway"),
    row("mesh.log_level", Kind.TEXT, "warning", "how much to log", roles=_ALL, choices=_LOG_LEVELS),
)  # fmt: skip
_BROKER = (
    row("broker.name", Kind.TEXT, "broker", "name of this broker", name="broker_name"),
    row("broker.bind", Kind.TEXT, "127.0.0.1", "address to listen on"),
    row("broker.keys", Kind.TEXT, "", "folder of keys, made by `llambo keys init`; empty: all peers may connect"),
    # Three more ports follow it, so the highest is 65532.
    row("broker.port", Kind.NUMBER, 7330, "first of four ports in a row; 0 takes any free ones", high=65_532),
    row("broker.policy", Kind.TEXT, "least-loaded", "how a worker is chosen for a request", choices=_POLICIES),
    row("broker.queue_requests", Kind.NUMBER, 1_000, "most requests that wait; more are refused as busy", low=1),
    row("broker.queue_bytes", Kind.BYTES, 64 * MIB, "memory for the prompts of waiting requests", low=1024),
    row("broker.queue_ms", Kind.MS, 600_000, "longest wait in the queue", low=1, high=_LONGEST_MS),
    row("broker.transcript_bytes", Kind.BYTES, 256 * MIB, "memory for the tokens of running requests", low=MIB),
    row("broker.detached_bytes", Kind.BYTES, 64 * MIB, "memory for the results of detached requests"),
    row("broker.detached_ms", Kind.MS, 3_600_000, "how long the result of a detached request is stored",
        high=_LONGEST_MS),
    row("broker.hold_ms", Kind.MS, 30_000, "how long a request waits when no worker has its model", high=_LONGEST_MS),
    row("broker.slow_factor", Kind.NUMBER, 8, "a worker so many times slower than its peers gets no new work; 0: never",
        high=1_000),
    row("broker.heartbeat_ms", Kind.MS, 200, "interval between two heartbeats", low=10, high=60_000),
    row("broker.ping_ms", Kind.MS, 100, "interval between two attempts to reach a worker", low=10, high=60_000),
    row("broker.lease_ms", Kind.MS, 2_000, "a worker that is silent for so long counts as lost", low=100,
        high=_LONGEST_MS),
    row("broker.client_lease_ms", Kind.MS, 10_000, "a client that is silent for so long counts as gone", low=100,
        high=_LONGEST_MS),
    row("broker.reconnect_grace_ms", Kind.MS, 300, "a worker whose connection is broken for so long counts as lost",
        high=_LONGEST_MS),
    row("broker.adopt_ms", Kind.MS, 1_000,
        "how long requests of a former broker wait for the worker that still runs them",
        high=_LONGEST_MS),
    row("broker.young_ms", Kind.MS, 5_000,
        "after the start of the broker, refusals for unknown requests are deferred so long",
        high=_LONGEST_MS),
    row("broker.metrics", Kind.TEXT, "",
        "host:port for Prometheus, such as 127.0.0.1:9330; empty: no metrics over HTTP"),
    row("broker.metrics_token", Kind.TEXT, "",
        "file with the token that Prometheus has to send; needed beyond this machine"),
    row("broker.tail_grace_ms", Kind.MS, 10, "how long to wait for late tokens before asking for them again",
        high=10_000),
)  # fmt: skip
_WORKER = (
    row("worker.name", Kind.TEXT, "", "name of this worker; empty: HOST-PID, or with a key KEY-HOST"),
    row("worker.slots", Kind.NUMBER, 4, "requests that run at a time", low=1, high=16_384),
    row("worker.class", Kind.TEXT, "", "kind of machine, shown in lists", name="node_class", env="class"),
    row("worker.engine", Kind.TEXT, "auto", "llama; or fake, which has no model and makes words up; auto: llama",
        choices=("auto", "llama", "fake")),
    row("worker.model", Kind.TEXT, "", "a GGUF file, or smollm2 if it is installed; empty: smollm2"),
    row("worker.lora", Kind.TEXT, "", "adapters of the model, as NAME=FILE with commas between; requests name them as "
        "MODEL+NAME"),
    row("worker.models", Kind.TEXT, "", "folders, files and names of models, separated by commas, or all that this "
        "machine has (all): each is loaded when it is asked for"),
    row("worker.memory_bytes", Kind.BYTES, 0, "memory for all models that are loaded at a time; 0: what is free at the "
        "start, but for a margin"),
    row("worker.model_ttl_ms", Kind.MS, 0, "a model that nothing has used for so long is unloaded; 0: never",
        high=_LONGEST_MS),
    row("worker.min_loaded_ms", Kind.MS, 30_000, "a model stays loaded for so long, or for five times as long as its "
        "load took, if that is less", high=_LONGEST_MS),
    row("worker.helper_percent", Kind.NUMBER, 20, "percent of the memory that models for embeddings and reranking can "
        "have without being unloaded for others", high=100),
    row("worker.share", Kind.TEXT, "", "where other hosts of the mesh may fetch files of its models, such as "
        "tcp://0.0.0.0:7341; port 0: any; empty: nowhere"),
    row("worker.ctx", Kind.NUMBER, 0, "tokens of the longest prompt and answer together; 0: the model's, at most 4096, "
        "halved until it fits the memory",
        high=16 * MIB),
    row("worker.threads", Kind.NUMBER, 0, "threads that compute; 0: one for each physical core", high=1_024),
    row("worker.batch", Kind.NUMBER, 512, "most tokens in one step", low=1, high=65_536),
    row("worker.gpu_layers", Kind.AUTO, "auto", "layers that GPUs compute; auto: as many as fit; -1: all; 0: none",
        low=-1, high=100_000),
    row("worker.gpu_bytes", Kind.BYTES, 0, "most memory of each GPU to use; 0: what is free, but for a margin"),
    row("worker.kv_type", Kind.TEXT, "f16", "number format of the KV cache",
        choices=("f16", "q8_0", "q4_0", "f32", "bf16")),
    row("worker.flash_attn", Kind.TEXT, "auto", "whether to use flash attention", choices=("auto", "on", "off")),
    row("worker.llama_lib", Kind.TEXT, "", "libllama.so of your own build of llama.cpp, or its folder; empty: that of "
        "llama-cpp-python, else that of xllamacpp"),
    row("worker.orphan_ms", Kind.MS, 30_000, "how long requests go on without a broker", high=_LONGEST_MS),
    row("worker.drain_ms", Kind.MS, 30_000, "how long running requests get to finish at exit", high=_LONGEST_MS),
    row("worker.stall_ms", Kind.MS, 10_000, "an engine that makes no progress for so long is killed", low=1),
)  # fmt: skip
_CLIENT = (
    row("client.model", Kind.TEXT, "", "name of the model; empty: the only one", name="client_model", env="model"),
    row("client.max_tokens", Kind.NUMBER, 256, "longest answer, in tokens", low=1, high=131_072),
    row("client.temperature", Kind.REAL, 0.8, "0 always takes the likeliest token; a model may define another default",
        high=100),
    row("client.connect_ms", Kind.MS, 5_000, "how long to wait for the broker", low=1, high=_LONGEST_MS),
    row("client.models_dir", Kind.TEXT, "", "folder of GGUF files for `llambo models` to list as well"),
    row("client.timeout_ms", Kind.MS, 0, "longest wait for a whole answer; 0: no limit", high=_LONGEST_MS),
)  # fmt: skip
_FAKE = (
    row("fake.style", Kind.TEXT, "plain",
        "plain: each token is computed from the prompt; wander: from the previous token",
        choices=("plain", "wander")),
    row("fake.ttft_ms", Kind.MS, 0, "time to the first token", high=_LONGEST_MS),
    row("fake.tokens_per_s", Kind.REAL, 0.0, "tokens per second of each stream; 0: as fast as possible"),
    row("fake.jitter_ms", Kind.MS, 0, "most random delay of each step", high=_LONGEST_MS),
    row("fake.burst", Kind.NUMBER, 1, "most tokens in a chunk", low=1, high=4_096),
    row("fake.utf8_split", Kind.SWITCH, False, "split some characters across tokens"),
    row("fake.answer_tokens", Kind.NUMBER, 0, "mean length of an answer; 0: as long as allowed"),
    row("fake.context_tokens", Kind.NUMBER, 0, "tokens of the longest prompt and answer together; 0: no limit"),
    row("fake.embedding_size", Kind.NUMBER, 8, "dimensions of an embedding", low=1, high=65_536),
    row("fake.kind", Kind.TEXT, "generate", "what the model is for", choices=("generate", "embed", "rerank")),
    row("fake.crash_at", Kind.NUMBER, 0, "crash after so many tokens; 0: never"),
    row("fake.hang_at", Kind.NUMBER, 0, "hang after so many tokens; 0: never"),
    row("fake.slow_at", Kind.NUMBER, 0, "slow down after so many tokens; 0: never"),
    row("fake.slow_factor", Kind.REAL, 10.0, "how many times slower than before", low=1),
    row("fake.load_ms", Kind.MS, 0, "how long loading takes", high=_LONGEST_MS),
    row("fake.memory_bytes", Kind.BYTES, 0, "memory that it takes when it is loaded"),
    row("fake.load_crash", Kind.TEXT, "never",
        "crash while loading: never, always, or careless: unless safe settings are used",
        choices=("never", "careless", "always")),
    row("fake.load_file", Kind.TEXT, "", "load only if this file exists; {model} in it is the name of the model"),
    row("fake.poison", Kind.TEXT, "", "a prompt that contains this text crashes the engine that runs it"),
)  # fmt: skip

_GATEWAY = (
    # Their flags and variables begin with http, because `llambo up` has those of a broker as well.
    row("gateway.bind", Kind.TEXT, "127.0.0.1", "address to listen on for HTTP", name="http_bind", flag="http_bind"),
    row("gateway.port", Kind.NUMBER, 7340, "port for HTTP; 0 takes any free one", name="http_port",
        flag="http_port", high=65_535),
    row("gateway.keys", Kind.TEXT, "", "folder of keys and API tokens; empty: every client is accepted",
        name="http_keys", flag="http_keys"),
    row("gateway.tls_cert", Kind.TEXT, "", "file with the certificate for HTTPS, and its chain"),
    row("gateway.tls_key", Kind.TEXT, "", "file with the certificate's private key"),
    row("gateway.plain", Kind.SWITCH, False,
        "listen without TLS beyond this machine, because a proxy in front provides it",
        name="http_plain", flag="http_plain"),
    row("gateway.cors", Kind.TEXT, "", "origins whose pages may send requests, separated by commas; *: all",
        name="http_cors", flag="http_cors"),
    row("gateway.hosts", Kind.TEXT, "", "host names to accept without keys, separated by commas",
        name="http_hosts", flag="http_hosts"),
    row("gateway.body_bytes", Kind.BYTES, 8 * MIB, "longest body of a request", low=1024),
    row("gateway.answer_tokens", Kind.NUMBER, 2_048, "longest answer if the request names no maximum", low=1,
        high=131_072),
    row("gateway.resume_ms", Kind.MS, 5_000, "how long a stream waits for a client to reconnect",
        high=_LONGEST_MS),
    row("gateway.http_requests", Kind.NUMBER, 4_096, "most open requests; more are refused", low=1),
    row("gateway.http_unread_bytes", Kind.BYTES, 64 * MIB, "memory for what clients have not read yet", low=MIB),
    row("gateway.leave_ms", Kind.MS, 30_000, "how long open requests get to finish at exit", high=_LONGEST_MS),
)  # fmt: skip
_BRIDGE = (
    row("bridge.socket", Kind.TEXT, "", "path of the Unix socket; empty: llambo-bridge.sock in the runtime folder",
        name="bridge_socket"),
    row("bridge.tcp", Kind.NUMBER, -1, "TCP port on loopback, in place of the socket; 0 takes any free one, -1: none",
        name="bridge_tcp", low=-1, high=65_535),
    row("bridge.connections", Kind.NUMBER, 256, "most connections at a time", name="bridge_connections", low=1),
    row("bridge.in_flight", Kind.NUMBER, 16, "most answers in progress on one connection", name="bridge_in_flight",
        low=1),
    row("bridge.line_bytes", Kind.BYTES, MIB, "longest line, or msgpack object", name="bridge_line_bytes", low=1024),
    row("bridge.leave_ms", Kind.MS, 10_000, "how long answers get to finish at exit", name="bridge_leave_ms",
        high=_LONGEST_MS),
)  # fmt: skip

TABLE: tuple[Setting, ...] = _MESH + _BROKER + _WORKER + _CLIENT + _GATEWAY + _BRIDGE + _FAKE
BY_NAME: dict[str, Setting] = {setting.name: setting for setting in TABLE}
BY_ENV: dict[str, list[Setting]] = {
    env: [setting for setting in TABLE if setting.env == env] for env in sorted({setting.env for setting in TABLE})
}
SECTIONS: dict[str, dict[str, Setting]] = {
    section: {setting.key: setting for setting in TABLE if setting.section == section}
    for section in ("mesh", "broker", "worker", "client", "gateway", "bridge", "fake")
}


def of_roles(*roles: str) -> list[Setting]:
    """The settings of these roles, in the order of the table."""
    return [setting for setting in TABLE if setting.roles & set(roles)]
