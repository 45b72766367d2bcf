"""What an engine child says to people: lines on stderr, or entries of the journal if that is where stderr leads."""

from __future__ import annotations

import logging
import os
import sys

from llambo.mesh.service import journal

log = logging.getLogger("llambo.engine")


def begin(worker: str) -> None:
    """Once, in the child. `worker`: whose engine it is."""
    handler: logging.Handler = logging.StreamHandler()
    prefix = "llambo engine"
    if journal.is_journal(os.environ, sys.stderr.fileno()):
        handler = journal.JournalHandler("llambo-worker", sys.stderr, {"worker": worker})
        prefix = "engine"
    handler.setFormatter(logging.Formatter(f"{prefix}: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def tell(text: str, level: int = logging.INFO) -> None:
    """Whoever started the worker may want to know, for example what was chosen for the machine."""
    log.log(level, "%s", text)
