"""Every setting there is: one table for flags, environment variables and `llambo.toml`.

A setting is called the same everywhere: `queue_bytes` under `[broker]` in the file is `--queue-bytes` on
the command line and `LLAMBO_QUEUE_BYTES` in the environment. The few exceptions say so in their row.
"""

from __future__ import annotations

from llambo.mesh.settings.setting import KEY_PREFIX, MIB, Kind, Setting, Value
from llambo.mesh.settings.setting import fake as _fake
from llambo.mesh.settings.setting import row as _row

__all__ = ["BY_ENV", "BY_NAME", "KEY_PREFIX", "SECTIONS", "TABLE", "Kind", "Setting", "Value", "of_roles"]

#: Longest duration: about a month, which catches a value given in microseconds.
_LONGEST_MS = 31 * 86_400_000
_ALL = "broker worker client gateway"
_POLICIES = ("least-loaded", "round-robin", "random")
_LOG_LEVELS = ("debug", "info", "warning", "error")

_MESH = (
    _row(
        "mesh.broker",
        Kind.TEXT,
        "tcp://127.0.0.1:7330",
        "address of the broker; of several, with commas",
        roles="worker client gateway",
    ),
    _row(
        "mesh.key",
        Kind.KEY,
        "",
        "the key that a broker wants: a file, or the line itself",
        roles="worker client gateway",
    ),
    _row("mesh.log_level", Kind.TEXT, "warning", "how much to log", roles=_ALL, choices=_LOG_LEVELS),
)
_BROKER = (
    _row("broker.name", Kind.TEXT, "broker", "name of this broker", name="broker_name"),
    _row("broker.bind", Kind.TEXT, "127.0.0.1", "address to listen on"),
    _row("broker.keys", Kind.TEXT, "", "folder of keys, made by `llambo keys init`; empty: everybody is let in"),
    # Three more ports follow it, so the last usable one is 65532.
    _row("broker.port", Kind.NUMBER, 7330, "first of four ports in a row; 0 takes any that are free", high=65_532),
    _row("broker.policy", Kind.TEXT, "least-loaded", "how a worker is chosen", choices=_POLICIES),
    _row("broker.queue_requests", Kind.NUMBER, 1_000, "requests that may wait; more are refused as busy", low=1),
    _row("broker.queue_bytes", Kind.BYTES, 64 * MIB, "prompts that may wait, together", low=1024),
    _row("broker.queue_ms", Kind.MS, 600_000, "longest wait in the queue", low=1, high=_LONGEST_MS),
    _row("broker.transcript_bytes", Kind.BYTES, 256 * MIB, "tokens kept for running requests, together", low=MIB),
    _row("broker.detached_bytes", Kind.BYTES, 64 * MIB, "finished detached results kept, together"),
    _row("broker.detached_ms", Kind.MS, 3_600_000, "how long a detached result is kept", high=_LONGEST_MS),
    _row("broker.hold_ms", Kind.MS, 30_000, "how long a request waits when no worker has its model", high=_LONGEST_MS),
    _row("broker.slow_factor", Kind.NUMBER, 8, "a worker so many times slower than its peers is left alone; 0: never",
         high=1_000),
    _row("broker.heartbeat_ms", Kind.MS, 200, "pause between two heartbeats", low=10, high=60_000),
    _row("broker.ping_ms", Kind.MS, 100, "pause between two tries to reach a worker", low=10, high=60_000),
    _row("broker.lease_ms", Kind.MS, 2_000, "a worker silent for so long is given up", low=100, high=_LONGEST_MS),
    _row("broker.client_lease_ms", Kind.MS, 10_000, "a client silent for so long is gone", low=100, high=_LONGEST_MS),
    _row("broker.reconnect_grace_ms", Kind.MS, 300, "a worker cut off for so long is given up", high=_LONGEST_MS),
    _row("broker.adopt_ms", Kind.MS, 1_000, "wait for a worker that still runs what a former broker gave it",
         high=_LONGEST_MS),
    _row("broker.young_ms", Kind.MS, 5_000, "after its start it waits so long before it refuses what it does not know",
         high=_LONGEST_MS),
    _row("broker.metrics", Kind.TEXT, "", "host:port where Prometheus may ask, such as 127.0.0.1:9330; empty: nowhere"),
    _row("broker.metrics_token", Kind.TEXT, "", "file with the token that it has to show; needed beyond this machine"),
    _row("broker.tail_grace_ms", Kind.MS, 10, "wait for late tokens before asking for them again", high=10_000),
)  # fmt: skip
_WORKER = (
    _row("worker.name", Kind.TEXT, "", "name of this worker; made from the host's when empty"),
    _row("worker.slots", Kind.NUMBER, 4, "requests it runs at a time", low=1, high=16_384),
    _row("worker.class", Kind.TEXT, "", "kind of machine, shown in lists", name="node_class", env="class"),
    _row("worker.engine", Kind.TEXT, "auto", "what makes the tokens: llama, or fake; auto is llama if there is a model",
         choices=("auto", "llama", "fake")),
    _row("worker.model", Kind.TEXT, "", "a GGUF file, or smollm2 if it is installed; the fake engine takes any name"),
    _row("worker.ctx", Kind.NUMBER, 0, "longest prompt and answer together; 0 is what suits model and machine",
         high=16 * MIB),
    _row("worker.threads", Kind.NUMBER, 0, "threads that compute; 0 is one for each core", high=1_024),
    _row("worker.batch", Kind.NUMBER, 512, "most tokens in one step", low=1, high=65_536),
    _row("worker.gpu_layers", Kind.NUMBER, 0, "layers a GPU computes; -1 is all", low=-1, high=100_000),
    _row("worker.kv_type", Kind.TEXT, "f16", "how the cache keeps its numbers",
         choices=("f16", "q8_0", "q4_0", "f32", "bf16")),
    _row("worker.flash_attn", Kind.TEXT, "auto", "whether to use flash attention", choices=("auto", "on", "off")),
    _row("worker.orphan_ms", Kind.MS, 30_000, "how long requests run on without a broker", high=_LONGEST_MS),
    _row("worker.drain_ms", Kind.MS, 30_000, "how long running requests get to finish at exit", high=_LONGEST_MS),
    _row("worker.stall_ms", Kind.MS, 10_000, "an engine without progress for so long is killed", low=1),
)  # fmt: skip
_CLIENT = (
    _row("client.model", Kind.TEXT, "", "model to ask; the only one when empty", name="client_model", env="model"),
    _row("client.max_tokens", Kind.NUMBER, 256, "longest answer, in tokens", low=1, high=131_072),
    _row(
        "client.temperature",
        Kind.REAL,
        0.8,
        "0 always takes the likeliest token; a model may have a default of its own",
        high=100,
    ),
    _row("client.connect_ms", Kind.MS, 5_000, "how long to look for the broker", low=1, high=_LONGEST_MS),
    _row("client.models_dir", Kind.TEXT, "", "a folder of GGUF files that `llambo models` lists, too"),
    _row("client.timeout_ms", Kind.MS, 0, "longest wait for a whole answer; 0 waits for ever", high=_LONGEST_MS),
)
_FAKE = (
    _fake("style", Kind.TEXT, "plain", "plain: a token follows from the prompt; wander: from the token before it",
          choices=("plain", "wander")),
    _fake("ttft_ms", Kind.MS, 0, "time to the first token", high=_LONGEST_MS),
    _fake("tokens_per_s", Kind.REAL, 0.0, "tokens per second of each stream; 0 is as fast as it can"),
    _fake("jitter_ms", Kind.MS, 0, "each step takes up to this much longer", high=_LONGEST_MS),
    _fake("burst", Kind.NUMBER, 1, "tokens in a chunk: 1 to this many", low=1, high=4_096),
    _fake("utf8_split", Kind.SWITCH, False, "cut characters across tokens now and then"),
    _fake("answer_tokens", Kind.NUMBER, 0, "mean length of an answer; 0 runs to the limit"),
    _fake("context_tokens", Kind.NUMBER, 0, "longest prompt and answer together; 0 is no limit"),
    _fake("embedding_size", Kind.NUMBER, 8, "numbers in an embedding", low=1, high=65_536),
    _fake("crash_at", Kind.NUMBER, 0, "die after this many tokens; 0 never"),
    _fake("hang_at", Kind.NUMBER, 0, "stop for ever after this many tokens; 0 never"),
    _fake("slow_at", Kind.NUMBER, 0, "slow down after this many tokens; 0 never"),
    _fake("slow_factor", Kind.REAL, 10.0, "how many times slower it gets", low=1),
    _fake("load_ms", Kind.MS, 0, "how long it takes to load", high=_LONGEST_MS),
    _fake("load_crash", Kind.TEXT, "never", "die while loading: never, always, or careless: unless told to be careful",
          choices=("never", "careless", "always")),
    _fake("load_file", Kind.TEXT, "", "load only if there is this file"),
    _fake("poison", Kind.TEXT, "", "a prompt with this in it kills the engine that runs it"),
)  # fmt: skip

_GATEWAY = (
    # Their flags and variables say http, because `llambo up` has a broker's beside them.
    _row("gateway.bind", Kind.TEXT, "127.0.0.1", "address to listen on for HTTP", name="http_bind", flag="http_bind"),
    _row("gateway.port", Kind.NUMBER, 7340, "port for HTTP; 0 takes any that is free", name="http_port",
         flag="http_port", high=65_535),
    _row("gateway.keys", Kind.TEXT, "", "folder of keys, with the API tokens; empty: everybody is let in",
         name="http_keys", flag="http_keys"),
    _row("gateway.tls_cert", Kind.TEXT, "", "file with the certificate for HTTPS, and its chain"),
    _row("gateway.tls_key", Kind.TEXT, "", "file with the certificate's private key"),
    _row("gateway.plain", Kind.SWITCH, False, "listen without TLS beyond this machine, because a proxy in front has it",
         name="http_plain", flag="http_plain"),
    _row("gateway.cors", Kind.TEXT, "", "origins whose pages may ask; with commas between, * is all",
         name="http_cors", flag="http_cors"),
    _row("gateway.hosts", Kind.TEXT, "", "names it may be asked by without keys; with commas between",
         name="http_hosts", flag="http_hosts"),
    _row("gateway.body_bytes", Kind.BYTES, 8 * MIB, "longest body of a request", low=1024),
    _row("gateway.answer_tokens", Kind.NUMBER, 2_048, "longest answer for who names no maximum", low=1,
         high=131_072),
    _row("gateway.resume_ms", Kind.MS, 5_000, "how long a stream waits for a client that was cut off",
         high=_LONGEST_MS),
    _row("gateway.http_requests", Kind.NUMBER, 4_096, "requests that may be open at a time; more are refused", low=1),
    _row("gateway.leave_ms", Kind.MS, 30_000, "how long open requests get to finish at exit", high=_LONGEST_MS),
)  # fmt: skip
_BRIDGE = (
    _row("bridge.socket", Kind.TEXT, "", "path of the Unix socket; empty: llambo-bridge.sock in the runtime folder",
         name="bridge_socket"),
    _row("bridge.tcp", Kind.NUMBER, -1, "TCP port on loopback, in place of the socket; 0 takes any, -1 none",
         name="bridge_tcp", low=-1, high=65_535),
    _row("bridge.connections", Kind.NUMBER, 256, "connections at a time", name="bridge_connections", low=1),
    _row("bridge.in_flight", Kind.NUMBER, 16, "answers under way on one connection", name="bridge_in_flight", low=1),
    _row("bridge.line_bytes", Kind.BYTES, MIB, "longest line, or msgpack object", name="bridge_line_bytes", low=1024),
    _row("bridge.leave_ms", Kind.MS, 10_000, "how long answers get to finish at exit", name="bridge_leave_ms",
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
    """The settings that matter to any of these roles, in the order of the table."""
    return [setting for setting in TABLE if setting.roles & set(roles)]
