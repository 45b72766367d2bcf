"""Names of models that include a class of workers: `smollm2@tiny` is smollm2 on workers of the class tiny.

A worker of a class announces each of its models under both names, and to a broker the two are different models. A
request with the longer name runs on a worker of that class. `@tiny` is any model of that class.
"""

from __future__ import annotations

from llambo.mesh.wire import limits

MARK = "@"


def in_class(model: str, node_class: str) -> str:
    """The longer name; the plain one if there is no class, or if the longer name is too long."""
    name = f"{model}{MARK}{node_class}" if node_class else model
    return name if len(name) <= limits.NAME_CHARS else model


def plain(name: str) -> str:
    """The name of the model without a class."""
    return name.rpartition(MARK)[0] or name


def class_of(name: str) -> str:
    """The class in a name; empty for a plain name."""
    return name.rpartition(MARK)[2] if MARK in name else ""
