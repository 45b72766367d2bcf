"""The keys of fleet.toml, besides the settings of workers and of the broker: one table for the reader and the docs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llambo.fleet.model import PROVIDERS, Fleet, Scaling
from llambo.mesh.settings.settings_table import SECTIONS, Kind, Setting, Value

_MIB = 1024 * 1024
#: About a month: catches a value in microseconds.
_LONGEST_MS = 31 * 86_400_000
MOST = 100_000


@dataclass(frozen=True, slots=True)
class Key:
    """One key, checked and read like a setting. `words`: its value is a list of texts."""

    setting: Setting
    words: bool = False

    @property
    def name(self) -> str:
        return self.setting.key

    def parse(self, raw: Any) -> Any:
        """ValueError says what was expected."""
        if not self.words:
            value = self.setting.parse(raw)
            if self.setting.kind is Kind.BYTES and 0 < int(value) < _MIB:
                raise ValueError('expected a size, as "600MiB"')
            return value
        if not isinstance(raw, list) or not all(isinstance(word, str) and word for word in raw):
            raise ValueError("expected a list of texts")
        return tuple(dict.fromkeys(raw))


def _key(
    name: str,
    kind: Kind,
    default: Value,
    text: str,
    *,
    low: float = 0,
    high: float = MOST,
    choices: tuple[str, ...] = (),
    words: bool = False,
) -> Key:
    row = Setting(
        name=name, section="", kind=kind, default=default, help=text, roles=frozenset(), key=name, flag="", env="",
        choices=choices, low=low, high=high,
    )  # fmt: skip
    return Key(row, words)


def _ms(name: str, text: str, low: int = 0) -> Key:
    return _key(name, Kind.MS, getattr(Scaling(), name), text, low=low, high=_LONGEST_MS)


def _percent(name: str, text: str) -> Key:
    return _key(name, Kind.NUMBER, getattr(Scaling(), name), text, low=1, high=100)


FLEET = (
    _key("name", Kind.TEXT, "fleet", "name of this fleet"),
    _key("broker", Kind.TEXT, "", "address of the broker; empty: as in the settings"),
    _key("keys", Kind.TEXT, "", "folder of keys, made by `llambo keys init`; workers' keys are made in it"),
    _key(
        "max_unavailable",
        Kind.NUMBER,
        Fleet().max_unavailable,
        "workers of a class replaced at a time",
        low=1,
    ),
    _key(
        "settle_ms",
        Kind.MS,
        Fleet().settle_ms,
        "how long a new worker works before the next is replaced",
        high=_LONGEST_MS,
    ),
)
HOST = (
    _key("provider", Kind.TEXT, "process", "what starts workers there", choices=PROVIDERS),
    _key("address", Kind.TEXT, "", "for ssh, as user@box; empty: this machine"),
    _key("user", Kind.SWITCH, False, "the user's own service manager instead of the machine's"),
    _key("memory", Kind.BYTES, 0, "memory for workers; 0: all of it, on this machine only", high=math.inf),
    _key("cores", Kind.REAL, 0.0, "cores for workers; 0: all of them, on this machine only"),
    _key("labels", Kind.TEXT, "", "properties of the host, in your own words", words=True),
)
#: For classes and the broker.
NODE = (
    _key("memory", Kind.BYTES, 0, "what one of them needs; no default", high=math.inf),
    _key("cores", Kind.REAL, 0.0, "cores one of them needs; 0: its `threads`, or else one"),
    _key("cpu_weight", Kind.NUMBER, 100, "its share of a busy processor", low=1, high=10_000),
)
CLASS = (
    _key("min", Kind.NUMBER, 0, "fewest workers"),
    _key("max", Kind.NUMBER, 1, "most workers; at least `min`"),
    *NODE,
    _key("hosts", Kind.TEXT, "", "names of the hosts that may run it; default: all", words=True),
    _key("labels", Kind.TEXT, "", "only on hosts that have all of these", words=True),
)
BROKER_KEYS = (*NODE, _key("host", Kind.TEXT, "", "the host that runs it; default: the first one"))
SCALE = (
    _percent("high_percent", "the class grows above this share of slots busy or waited for"),
    _percent("low_percent", "it shrinks below this share"),
    _percent("aim_percent", "both bring it to this share"),
    _ms("wait_ms", "a request that has waited for so long makes it grow at once"),
    _ms("grow_after_ms", "how long it is above `high_percent` before it grows"),
    _ms("shrink_after_ms", "how long it is below `low_percent` before it shrinks"),
    _ms("grow_pause_ms", "pause between one growth and the next"),
    _ms("shrink_pause_ms", "pause between any change and a shrinking"),
    _ms("idle_ms", "with `min = 0` the last worker ends after being idle for so long"),
    _key("grow_by", Kind.NUMBER, 0, "most workers added in one step; 0: as many as needed"),
    _key("shrink_by", Kind.NUMBER, 0, "most workers removed in one step; 0: half of them"),
    _ms("catch_up_ms", "time in which a backlog should be worked off", low=1_000),
)

#: Settings that the fleet itself chooses for each worker.
_OURS = frozenset({"name", "class"})
#: Settings of workers that a class has by another name: the budget of a host is its `memory`.
_BY_OTHER_NAMES = frozenset({"memory_bytes"})
WORKER_SETTINGS = {key: row for key, row in SECTIONS["worker"].items() if key not in _OURS | _BY_OTHER_NAMES}
BROKER_SETTINGS = {key: row for key, row in SECTIONS["broker"].items() if key not in {"name", "keys"}}
#: Keys that people try, and what they mean.
ALSO_CALLED = {
    "context": "ctx", "context_size": "ctx", "n_ctx": "ctx", "cpus": "cores", "mem": "memory", "ram": "memory",
    "count": "min", "minimum": "min", "maximum": "max", "host": "hosts", "label": "labels", "ssh": "address",
    "ngl": "gpu_layers", "n_gpu_layers": "gpu_layers", "parallel": "slots", "utilization": "high_percent",
    "utilisation": "high_percent", "memory_bytes": "memory", "queue_wait_ms": "wait_ms", "workers": "classes",
}  # fmt: skip


def by_name(keys: Iterable[Key]) -> dict[str, Key]:
    return {key.name: key for key in keys}
