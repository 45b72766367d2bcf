"""Names of models, with and without a class of workers, with and without an adapter; and the fingerprints that tell
models of one name apart.

`smollm2@tiny` is smollm2 on workers of the class tiny. A worker of a class announces each of its models under both
names, and to a broker the two are different models. A request with the longer name runs on a worker of that class.
`@tiny` is any model of that class.

`smollm2+pirate` is smollm2 with the adapter (LoRA) pirate. A worker announces each of its adapters in that way, as a
model of its own, whose fingerprint has the digest of the adapter in it. So a request for it runs, and continues, only
on workers that have this adapter. `+pirate` is any model with an adapter of that name.

A broker compares fingerprints as they are. What is in one is read only to tell people what differs.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from llambo.mesh.wire import limits

MARK = "@"
#: Between a model and its adapter.
PLUS = "+"

#: The first part of the fingerprint of a fake engine, where that of a model has its architecture.
FAKE = "fake"


def is_fake(fingerprint: str) -> bool:
    """The words of this model are made up: a fake engine serves it, for tests."""
    return fingerprint.partition("-")[0] == FAKE


def in_class(model: str, node_class: str) -> str:
    """The longer name; the plain one if there is no class, or if the longer name is too long."""
    name = f"{model}{MARK}{node_class}" if node_class else model
    return name if len(name) <= limits.NAME_CHARS else model


def plain(name: str) -> str:
    """The name of the model without a class."""
    return name.rpartition(MARK)[0] or name


def is_in_class(name: str, names: Container[str]) -> bool:
    """It is the longer name of a model that is among these by its plain one."""
    return MARK in name and plain(name) in names


def class_of(name: str) -> str:
    """The class in a name; empty for a plain name."""
    return name.rpartition(MARK)[2] if MARK in name else ""


# --- adapters ---


def with_adapter(model: str, adapter: str) -> str:
    """`smollm2+pirate`, before the class if there is one. Without a model `+pirate`, without an adapter the model."""
    base, mark, node_class = model.partition(MARK)
    return f"{base}{PLUS}{adapter}{mark}{node_class}" if adapter else model


def without_adapter(name: str) -> str:
    """The model that an adapter belongs to, with its class; the name itself if there is no adapter in it."""
    base, mark, node_class = name.partition(MARK)
    return f"{base.rpartition(PLUS)[0]}{mark}{node_class}" if PLUS in base else name


def has_adapter(name: str, names: Container[str]) -> bool:
    """It is the name of an adapter of a model that is among these."""
    return PLUS in name and without_adapter(name) in names


def is_listed_otherwise(name: str, names: Container[str]) -> bool:
    """It is a model of these with a class or an adapter in its name: where memory is listed, the same once more."""
    return is_in_class(name, names) or has_adapter(name, names)


def is_adapter_name(adapter: str) -> bool:
    """It can be part of the name of a model, and of a list on a command line."""
    return adapter.isprintable() and 0 < len(adapter) <= limits.ADAPTER_CHARS and not set(adapter) & set("+@,=:/ ")


# --- fingerprints ---

#: Characters of the digest of a file that people are shown.
_DIGEST_SHOWN = 8
#: The flags of a worker that decide whether its answers can go on elsewhere, by the part of a fingerprint.
_FLAGS = {"ctx": "--ctx", "kv_type": "--kv-type"}
#: Parts that stand for a file.
_FILES = {"file": "model file", "adapter": "adapter file"}
#: Of the digest of an adapter, what is in a fingerprint.
_ADAPTER_DIGITS = 32


def fingerprint(architecture: str, quantisation: object, ctx: int, kv_type: str, weights: str, template: str) -> str:
    """Equal only for workers that can continue each other's answers: same weights, template, context and cache.

    `weights` and `template` are digests.
    """
    return f"{architecture}-{quantisation}-{ctx}-{kv_type}-{weights}-{template}"[: limits.NAME_CHARS]


def adapter_fingerprint(fingerprint: str, sha256: str) -> str:
    """That of a model with an adapter."""
    return f"{fingerprint[: limits.NAME_CHARS - _ADAPTER_DIGITS - 1]}{PLUS}{sha256[:_ADAPTER_DIGITS]}"


def what_differs(fingerprints: Sequence[str]) -> list[str]:
    """Of each of them the parts that are not the same in all, for people: `ctx 2048`."""
    parts = _differing(fingerprints)
    return [", ".join(f"{name} {value}" for name, value in each.items()) for each in parts]


def what_it_is(fingerprint: str) -> str:
    """The settings in it, for people: `ctx 2048, kv_type f16`."""
    parts = _parts(fingerprint)
    shown = [name for name in (*_FLAGS, "adapter") if name in parts]
    return ", ".join(f"{name} {parts[name]}" for name in shown) or "the very same model"


def how_to_match(fingerprints: Sequence[str]) -> str:
    """What to start workers with so that they have one of these fingerprints: the one that needs the least memory."""
    parts = _differing(fingerprints)
    if any(name not in _FLAGS for name in parts[0]):
        file = next((what for part, what in _FILES.items() if part in parts[0]), "settings")
        return f"the same {file}"
    chosen = min(parts, key=lambda each: int(each.get("ctx", 0)))
    return " ".join(f"{_FLAGS[name]} {value}" for name, value in chosen.items())


def flags_of(fingerprint: str) -> str:
    """For a worker that is to have this fingerprint; empty if it has no such settings."""
    parts = _parts(fingerprint)
    return " ".join(f"{flag} {parts[name]}" for name, flag in _FLAGS.items() if name in parts)


def _differing(fingerprints: Sequence[str]) -> list[dict[str, str]]:
    all_parts = [_parts(each) for each in fingerprints]
    if any(each.keys() != all_parts[0].keys() for each in all_parts):
        return [{"model": each} for each in fingerprints]
    names = [name for name in all_parts[0] if len({each[name] for each in all_parts}) > 1]
    if "file" in names:  # then its template may differ as well
        names = [name for name in names if name != "template"]
    return [{name: each[name] for name in names} for each in all_parts]


def _parts(fingerprint: str) -> dict[str, str]:
    """What people know by a name. The fingerprint of a fake engine, or of a worker of another make, is one part."""
    model, _, adapter = fingerprint.partition(PLUS)
    words = model.rsplit("-", 4)
    if is_fake(fingerprint) or len(words) != 5 or not words[1].isdigit():
        return {"model": fingerprint}
    _, ctx, kv_type, weights, template = words
    parts = {"file": weights[:_DIGEST_SHOWN], "ctx": ctx, "kv_type": kv_type, "template": template}
    return parts | {"adapter": adapter[:_DIGEST_SHOWN]} if adapter else parts
