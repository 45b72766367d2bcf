"""Where the lines of the log go: for people to stderr, for the journal into its socket, with fields."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from llambo.cli.kit.std_streams import TELLERS
from llambo.mesh.service import journal

#: What every line of this process is about: a worker's name, once it is known.
ABOUT: dict[str, str] = {}


def set_up(level: str, environ: Mapping[str, str] = os.environ) -> None:
    root = logging.getLogger()
    if root.handlers:
        return  # somebody has decided already, as a test does
    if journal.is_journal(environ, sys.stderr.fileno()):
        handler: logging.Handler = (entries := journal.JournalHandler(_program(), sys.stderr, ABOUT))
        TELLERS.append(entries.show)
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(journal.HumanFormatter())
    root.addHandler(handler)
    root.setLevel(level)


def _program() -> str:
    context = click.get_current_context(silent=True)
    name = context.find_root().info_name if context is not None else None
    return Path(name or "llambo").name
