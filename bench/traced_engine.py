"""The engine child, with timestamps: see `trace`."""

from __future__ import annotations

import os
import sys

from bench.trace import trace_engine
from llambo.worker import engine_child

if __name__ == "__main__":
    # As the child itself does, before llama.cpp is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", str(engine_child.SPIN_COUNT))
    trace_engine()
    engine_child.main(sys.argv[1:])
