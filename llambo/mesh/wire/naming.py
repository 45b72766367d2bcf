"""Names of models that also say which class of workers: `smollm2@tiny` is smollm2 as workers of class tiny have it.

A worker of a class announces each of its models under both names. Whoever does not care uses the plain one, and
whoever does is given a worker of that class: to a broker the two are models like any others. `@tiny` is whatever that
class has.
"""

from __future__ import annotations

from llambo.mesh.wire import limits

MARK = "@"


def in_class(model: str, node_class: str) -> str:
    """The longer name; the plain one if there is no class, or no room for it."""
    name = f"{model}{MARK}{node_class}" if node_class else model
    return name if len(name) <= limits.NAME_CHARS else model


def plain(name: str) -> str:
    """The model's own name, whatever class is asked for."""
    return name.rpartition(MARK)[0] or name


def class_of(name: str) -> str:
    """Empty: it is a plain name."""
    return name.rpartition(MARK)[2] if MARK in name else ""
