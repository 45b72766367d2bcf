"""What llama.cpp logs: reasons, and the sizes of a dry run. The lines are those of real models."""

from __future__ import annotations

import pytest

from llambo.worker.llama.llama_log import LlamaLog, UnknownLog, read_log
from llambo.worker.models.placement import MIB, Work

PLAIN = """
print_info: file size   = 92.10 MiB (5.74 BPW)
load_tensors:        CUDA0 model buffer size =     0.00 MiB
llama_context:  CUDA_Host  output buffer size =     0.75 MiB
llama_kv_cache: layer   0: dev = CUDA0
llama_kv_cache: layer   1: dev = CPU
llama_kv_cache:      CUDA0 KV buffer size =     0.00 MiB
llama_kv_cache: size =  360.00 MiB (  4096 cells,   2 layers,  4/4 seqs), K (f16):  180.00 MiB, V (f16):  180.00 MiB
sched_reserve:      CUDA0 compute buffer size =    17.50 MiB
sched_reserve:  CUDA_Host compute buffer size =     4.25 MiB
sched_reserve: graph: nodes = 996, splits = 1, input objects = 4, input tensors = 6
""".splitlines()
#: Some layers see a window only, and one has a state instead of a cache.
MIXED = """
llama_kv_cache_iswa: creating non-SWA KV cache, size = 4096 cells
llama_kv_cache: layer   0: filtered
llama_kv_cache: layer   1: dev = CUDA0
llama_kv_cache: size =   64.00 MiB (  4096 cells,   1 layers,  4/4 seqs), K (f16):   32.00 MiB, V (f16):   32.00 MiB
llama_kv_cache_iswa: creating     SWA KV cache, size = 1536 cells
llama_kv_cache: layer   0: dev = CUDA0
llama_kv_cache: layer   2: dev = CUDA1
llama_kv_cache: size =   48.00 MiB (  1536 cells,   2 layers,  4/4 seqs), K (f16):   24.00 MiB, V (f16):   24.00 MiB
llama_memory_recurrent, layer   3: dev = CUDA1
llama_memory_recurrent: size =    8.00 MiB (     4 cells,   4 layers,  4 seqs  0 rs_seq), R (f32):    4.00 MiB
sched_reserve:      CUDA0 compute buffer size =    10.00 MiB
sched_reserve:      CUDA1 compute buffer size =    20.00 MiB
sched_reserve:        CPU compute buffer size =     1.00 MiB
""".splitlines()


def test_sizes_are_read_from_the_log() -> None:
    measured = read_log(PLAIN, 2)
    assert measured.cache == {0: 180 * MIB, 1: 180 * MIB}
    assert measured.work(["CUDA0"]) == Work(device=int(17.5 * MIB), host=5 * MIB)
    assert measured.work([]) == Work(device=0, host=int(22.5 * MIB))


def test_each_cache_has_its_own_layers() -> None:
    measured = read_log(MIXED, 4)
    assert measured.cache == {0: 24 * MIB, 1: 64 * MIB, 2: 24 * MIB, 3: 8 * MIB}
    assert measured.work(["CUDA0", "CUDA1"]) == Work(device=20 * MIB, host=MIB)


def test_a_cache_that_lists_no_layers_belongs_to_all() -> None:
    lines = [line for line in PLAIN if "dev =" not in line]
    assert read_log(lines, 4).cache == dict.fromkeys(range(4), 90 * MIB)


@pytest.mark.parametrize(("without", "what"), [("compute buffer|output buffer", "buffers"), ("size =  360", "cache")])
def test_a_log_without_sizes_is_an_error(without: str, what: str) -> None:
    lines = [line for line in PLAIN if not any(part in line for part in without.split("|"))]
    with pytest.raises(UnknownLog, match=f"does not show the size of its {what}"):
        read_log(lines, 2)


def test_warnings_and_errors_are_reasons() -> None:
    log = LlamaLog()
    for level, text in ((2, b"information\n"), (3, b"a warning, "), (5, b"which goes on\n"), (2, b"x"), (5, b"y")):
        log.on_line(level, text, None)
    assert log.reason() == "a warning,; which goes on"
    for number in range(20):
        log.on_line(4, b"error %d\n" % number, None)
    assert log.reason().split("; ") == [f"error {number}" for number in range(12, 20)]
    log.lines.clear()
    assert log.reason() == "llama.cpp gave no reason"


def test_all_lines_are_kept_on_request() -> None:
    log = LlamaLog()
    log.on_line(2, b"before", None)
    log.everything = []
    log.on_line(1, b"after\n", None)
    assert log.everything == ["after"]
