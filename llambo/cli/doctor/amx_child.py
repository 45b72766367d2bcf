"""Uses AMX once, in a process of its own: under some hypervisors the instruction ends the process that executes it.

Exit status 0 if it works. Run as `python -m llambo.cli.doctor.amx_child`, on x86-64 only.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

#: The exit status if the kernel does not let this process use tiles.
NOT_PERMITTED = 3
#: xor eax, eax; ldtilecfg [rdi]; tilezero tmm0; tilerelease; ret
CODE = bytes.fromhex("31c0 c4e2784907 c4e27b49c0 c4e27849c0 c3")
#: Palette 1; the first tile has 16 rows of 64 bytes.
TILES = bytes([1, *bytes(15), 64, *bytes(31), 16, *bytes(15)])
#: arch_prctl(2): the permission to use the tiles, which a process has to ask for.
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def main() -> int:
    if ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0:
        return NOT_PERMITTED
    return execute()


def execute() -> int:
    """0, if the process is still there."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(CODE)
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    return int(function(TILES))


if __name__ == "__main__":
    sys.exit(main())
