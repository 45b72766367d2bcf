"""Sampling defaults: the model's own where its file has them, otherwise ours; whatever a request says goes first.

Makers of a model may write into its file what they tried it with. llama.cpp's tools begin with those values, so a
request without options means the same here as there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from llambo.mesh.wire.messages import Sampling

#: What the file calls them, and what they are called in a request. (The order of samplers, `sequence`, is fixed here.)
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


def of_model(meta: Mapping[str, Any]) -> tuple[Defaults, list[str]]:
    """What its file recommends, and a word about each value that cannot be used here."""
    found: Defaults = {}
    complaints: list[str] = []
    for key, name in KEYS.items():
        if key not in meta:
            continue
        value = _number(meta[key])
        try:
            msgspec.convert({name: value}, Sampling)
        except msgspec.ValidationError as error:
            complaints.append(f"{key} is {meta[key]!r}: {error}")
        else:
            found[name] = value
    return found, complaints


def _number(value: Any) -> Any:
    """Some files keep whole numbers as floats. A float of four bytes becomes what was meant: 0.95, not 0.94999998."""
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else float(f"{value:.6g}")


def in_force(options: Sampling, given: Collection[str], defaults: Defaults) -> Sampling:
    """`given` are the options that the request itself has."""
    missing = {name: value for name, value in defaults.items() if name not in given}
    return msgspec.structs.replace(options, **missing) if missing else options


def options_in_force(defaults: Defaults) -> dict[str, Any]:
    """All options of numbers, as a request gets them that says nothing."""
    options: dict[str, Any] = msgspec.to_builtins(in_force(Sampling(), (), defaults))
    every = {name: getattr(Sampling(), name) for name in Sampling.__struct_fields__} | options
    return {name: value for name, value in every.items() if isinstance(value, int | float)}


def told(defaults: Defaults) -> str:
    """For whoever starts a worker."""
    ours = in_force(Sampling(), (), defaults)
    shown = ", ".join(
        f"{name.replace('_', '-')} {getattr(ours, name):g}{' (from the model)' if name in defaults else ''}"
        for name in ("temperature", "top_k", "top_p", "min_p", *(name for name in defaults if name not in _SHOWN))
    )
    return f"sampling, where a request says nothing: {shown}"


_SHOWN = frozenset({"temperature", "top_k", "top_p", "min_p"})
