"""llama-server as it is inside xllamacpp: the same code, started by a function instead of a program.

    python -m bench.prebuilt_server '{"model": "x.gguf", "port": 8080, ...}'

It serves until it is killed.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import xllamacpp


def main() -> None:
    terms: dict[str, Any] = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = terms["model"]
    params.hostnames, params.port = ["127.0.0.1"], terms["port"]
    params.n_parallel, params.n_ctx = terms["slots"], terms["slots"] * terms["context"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = terms["threads"]
    # As in the command of the program that is compiled.
    params.kv_unified, params.cache_ram_mib, params.no_extra_bufts = False, 0, terms["safe"]
    # It serves as long as this object is there.
    _server = xllamacpp.Server(params)
    signal.pause()


if __name__ == "__main__":
    main()
