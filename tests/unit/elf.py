"""Small shared libraries for x86-64, written byte by byte: what llama.cpp looks like to llambo, and liars.

No compiler is needed. A function whose code is not given ends the process when it is called (SIGILL).
"""

from __future__ import annotations

from struct import pack

PAGE = 4096
DEADLY = b"\x0f\x0b"  # ud2
RETURN = b"\xc3"


def returns(value: int) -> bytes:
    return b"\xb8" + pack("<I", value) + RETURN  # mov eax, value


def returns_struct(content: bytes) -> bytes:
    """Copies the content to where the caller wants a large struct: the address is in rdi."""
    code = b"\x48\x89\xf8"  # mov rax, rdi
    code += b"\x48\x8d\x35" + pack("<i", 8)  # lea rsi, [rip + 8]: behind the last instruction
    code += b"\xb9" + pack("<I", len(content)) + b"\xf3\xa4" + RETURN  # mov ecx, length; rep movsb
    return code + content


#: `llama_sampler_apply`, as if top-k had left the second of three candidates: array.size = 1, array.data[0].id = 8.
APPLIES_TOP_K = b"\x48\xc7\x46\x08" + pack("<I", 1) + b"\x48\x8b\x06" + b"\xc7\x00" + pack("<I", 8) + RETURN


def shared_object(functions: dict[str, bytes], needs: tuple[str, ...] = ()) -> bytes:
    """Two segments: one that is read and executed, and one page further the dynamic section, which is written."""
    names, places = b"\0", {}
    for name in (*functions, *needs):
        places[name] = len(names)
        names += name.encode() + b"\0"
    symbols = 1 + len(functions)
    hash_at = 64 + 4 * 56
    table_at = _align(hash_at + 4 * (3 + symbols))
    names_at = table_at + 24 * symbols
    code_at = _align(names_at + len(names))
    code, table = b"", bytes(24)
    for name, body in functions.items():
        # Global, a function, in section 1. There are no sections, but 0 would mean: not here.
        table += pack("<IBBHQQ", places[name], 0x12, 0, 1, code_at + len(code), len(body))
        code += body + bytes(-len(body) % 16)
    # A hash table of one bucket: a chain through all symbols.
    chain = pack("<III", 1, symbols, 1) + pack("<I", 0) + b"".join(pack("<I", n + 1) for n in range(1, symbols - 1))
    chain += pack("<I", 0)
    dynamic_at = -(-(code_at + len(code)) // PAGE) * PAGE
    entries = [(1, places[name]) for name in needs]
    entries += [(4, hash_at), (5, names_at), (6, table_at), (10, len(names)), (11, 24), (0, 0)]
    dynamic = b"".join(pack("<QQ", *entry) for entry in entries)
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0)
    text = _segment(1, 5, 0, code_at + len(code)) + _segment(1, 6, dynamic_at, len(dynamic))
    rest = _segment(2, 6, dynamic_at, len(dynamic)) + _segment(0x6474E551, 6, 0, 0)
    content = head + text + rest
    for at, part in ((hash_at, chain), (table_at, table), (names_at, names), (code_at, code), (dynamic_at, dynamic)):
        content = content.ljust(at, b"\0") + part
    return content


def _align(place: int) -> int:
    return -(-place // 16) * 16


def _segment(kind: int, flags: int, place: int, size: int) -> bytes:
    return pack("<IIQQQQQQ", kind, flags, place, place, place, size, size, PAGE)
