"""What a reader of a stream is given."""

from __future__ import annotations

import asyncio

from llambo.mesh.client.answer_stream import Stream


def test_a_piece_has_the_bytes_of_each_token_also_where_a_character_is_cut() -> None:
    stream = Stream(bytes(16), lambda event: None, mine=False)

    async def read() -> list[tuple[str, list[int], list[bytes]]]:
        found = []
        for ids, pieces in [([1, 2, 3], [b"a", b"", b" \xf0"]), ([4, 5], [b"\x9f\x98", b"\x80!"])]:
            stream.deliver(ids, pieces, [])
            piece = await stream.next_piece()
            assert piece is not None
            found.append((piece.text, piece.ids, piece.pieces))
        return found

    assert asyncio.run(read()) == [
        ("a ", [1, 2, 3], [b"a", b"", b" \xf0"]),
        ("\N{GRINNING FACE}!", [4, 5], [b"\x9f\x98", b"\x80!"]),
    ]
