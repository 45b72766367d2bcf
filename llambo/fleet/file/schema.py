"""What may stand in fleet.toml, beside the settings of workers and of the broker: one table, for reader and docs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llambo.fleet.model import PROVIDERS, Fleet, Scaling
from llambo.mesh.settings.settings_table import SECTIONS, Kind, Setting, Value

_MIB = 1024 * 1024
#: About a month, which catches a value given in microseconds.
_LONGEST_MS = 31 * 86_400_000
MOST = 100_000


@dataclass(frozen=True, slots=True)
class Key:
    """One value, checked and read as settings are; `words`: a list of texts."""

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
    _key("broker", Kind.TEXT, "", "address of the broker; empty: as the settings say"),
    _key("keys", Kind.TEXT, "", "folder of keys, made by `llambo keys init`; those of the workers are made in it"),
    _key("max_unavailable", Kind.NUMBER, Fleet().max_unavailable, "of a class, so many are replaced at a time", low=1),
    _key(
        "settle_ms",
        Kind.MS,
        Fleet().settle_ms,
        "a new one works for so long before the next is replaced",
        high=_LONGEST_MS,
    ),
)
HOST = (
    _key("provider", Kind.TEXT, "process", "who keeps what runs there", choices=PROVIDERS),
    _key("address", Kind.TEXT, "", "for ssh, as user@box; empty: this machine"),
    _key("user", Kind.SWITCH, False, "the user's own service manager instead of the machine's"),
    _key("memory", Kind.BYTES, 0, "memory for workers; 0: all there is, on this machine only", high=math.inf),
    _key("cores", Kind.REAL, 0.0, "cores for workers; 0: all there are, on this machine only"),
    _key("labels", Kind.TEXT, "", "what it is or has, in words of yours", words=True),
)
#: Of a class as of the broker.
NODE = (
    _key("memory", Kind.BYTES, 0, "what one of them takes; no default", high=math.inf),
    _key("cores", Kind.REAL, 0.0, "cores one of them takes; 0: its threads, or else one"),
    _key("cpu_weight", Kind.NUMBER, 100, "its share of a busy processor", low=1, high=10_000),
)
CLASS = (
    _key("min", Kind.NUMBER, 0, "workers there are at least"),
    _key("max", Kind.NUMBER, 1, "and at most; as `min` when that is more"),
    *NODE,
    _key("hosts", Kind.TEXT, "", "names of the hosts it may be on; all, if it is not said", words=True),
    _key("labels", Kind.TEXT, "", "only on hosts that have all of these", words=True),
)
BROKER_KEYS = (*NODE, _key("host", Kind.TEXT, "", "where it is kept; the first host, if it is not said"))
SCALE = (
    _percent("high_percent", "more than so much of its slots busy or waited for: the class grows"),
    _percent("low_percent", "less: it shrinks"),
    _percent("aim_percent", "to so much either brings it"),
    _ms("wait_ms", "a request that has waited so long makes it grow at once"),
    _ms("grow_after_ms", "it has been above `high_percent` for so long before it grows"),
    _ms("shrink_after_ms", "and below `low_percent` for so long before it shrinks"),
    _ms("grow_pause_ms", "between one growth and the next"),
    _ms("shrink_pause_ms", "between any change and a shrinking"),
    _ms("idle_ms", "with `min = 0` the last worker goes after so long with nothing to do"),
    _key("grow_by", Kind.NUMBER, 0, "most workers more in one step; 0: as many as it takes"),
    _key("shrink_by", Kind.NUMBER, 0, "most workers fewer in one step; 0: half of them"),
    _ms("catch_up_ms", "requests that have piled up should be worked off in so long", low=1_000),
)

#: What the fleet itself decides about each worker, so that nobody else may.
_OURS = frozenset({"name", "class"})
WORKER_SETTINGS = {key: row for key, row in SECTIONS["worker"].items() if key not in _OURS}
BROKER_SETTINGS = {key: row for key, row in SECTIONS["broker"].items() if key not in {"name", "keys"}}
#: What people write who have not read this.
ALSO_CALLED = {
    "context": "ctx", "context_size": "ctx", "n_ctx": "ctx", "cpus": "cores", "mem": "memory", "ram": "memory",
    "count": "min", "minimum": "min", "maximum": "max", "host": "hosts", "label": "labels", "ssh": "address",
    "ngl": "gpu_layers", "n_gpu_layers": "gpu_layers", "parallel": "slots", "utilization": "high_percent",
    "utilisation": "high_percent", "queue_wait_ms": "wait_ms", "workers": "classes",
}  # fmt: skip


def by_name(keys: Iterable[Key]) -> dict[str, Key]:
    return {key.name: key for key in keys}
