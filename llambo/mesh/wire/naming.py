"""Names of models that include a class of workers: `smollm2@tiny` is smollm2 on workers of the class tiny.

A worker of a class announces each of its models under both names, and to a broker the two are different models. A
request with the longer name runs on a worker of that class. `@tiny` is any model of that class.
"""

from __future__ import annotations

from collections.abc import Container

from llambo.mesh.wire import limits

MARK = "@"


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
