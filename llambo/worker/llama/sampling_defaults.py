"""Sampling defaults: options of the request first, then those in the model's file, then ours.

A model file may contain the sampling options that its authors recommend. llama.cpp's tools use them as defaults, so a
request without options means the same here as there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from llambo.mesh.wire.messages import Sampling

#: Names in the file and in a request. (The order of samplers, `sequence`, is not read: it is fixed here.)
KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.xtc_probability": "xtc_probability",
    "general.sampling.xtc_threshold": "xtc_threshold",
    "general.sampling.penalty_last_n": "penalty_last_n",
    "general.sampling.penalty_repeat": "repeat_penalty",
    "general.sampling.mirostat": "mirostat",
    "general.sampling.mirostat_tau": "mirostat_tau",
    "general.sampling.mirostat_eta": "mirostat_eta",
}

Defaults = dict[str, int | float]


def recommended(metadata: Mapping[str, Any]) -> tuple[Defaults, list[str]]:
    """What the model file recommends, and a text about each value that cannot be used."""
    found: Defaults = {}
    unusable: list[str] = []
    for key, name in KEYS.items():
        if key not in metadata:
            continue
        value = _number(metadata[key])
        try:
            msgspec.convert({name: value}, Sampling)
        except msgspec.ValidationError as error:
            unusable.append(f"{key} is {metadata[key]!r}: {error}")
        else:
            found[name] = value
    return found, unusable


def _number(value: Any) -> Any:
    """Some files have integers as floats. A float of four bytes is rounded to what was meant: 0.95, not 0.94999998."""
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else float(f"{value:.6g}")


def with_defaults(options: Sampling, given: Collection[str], defaults: Defaults) -> Sampling:
    """`given`: the names of the options that the request sets."""
    missing = {name: value for name, value in defaults.items() if name not in given}
    return msgspec.structs.replace(options, **missing) if missing else options


def numeric_options(defaults: Defaults) -> dict[str, Any]:
    """All numeric options of a request that sets none."""
    options: dict[str, Any] = msgspec.to_builtins(with_defaults(Sampling(), (), defaults))
    every = {name: getattr(Sampling(), name) for name in Sampling.__struct_fields__} | options
    return {name: value for name, value in every.items() if isinstance(value, int | float)}


def describe(defaults: Defaults) -> str:
    """For the log of a worker that starts."""
    options = with_defaults(Sampling(), (), defaults)
    shown = ", ".join(
        f"{name.replace('_', '-')} {getattr(options, name):g}{' (from the model)' if name in defaults else ''}"
        for name in ("temperature", "top_k", "top_p", "min_p", *(name for name in defaults if name not in _SHOWN))
    )
    return f"sampling defaults: {shown}"


_SHOWN = frozenset({"temperature", "top_k", "top_p", "min_p"})
