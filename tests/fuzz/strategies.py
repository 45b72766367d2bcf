"""Messages made by hypothesis, which reduces those that fail.

Where `mutator` begins with good messages, these begin with nothing: any value that msgpack can hold, maps with a known
`type` and known fields that hold anything, and frames in any number.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from llambo.mesh.wire import codec
from tests.fuzz.mutator import BYTES, NUMBERS, TEXTS, pack, unpack
from tests.fuzz.target import Frames
from tests.unit import samples

_NUMBERS = st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(), st.sampled_from(NUMBERS))
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    _NUMBERS,
    st.text(max_size=40),
    st.sampled_from(TEXTS),
    st.binary(max_size=40),
    st.sampled_from(BYTES),
)
_KEYS = st.one_of(st.text(max_size=12), st.integers(0, 2**64 - 1), st.binary(max_size=30))
#: Anything.
VALUES: st.SearchStrategy[Any] = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(_KEYS, inner, max_size=6), max_leaves=12
)


def _fields(direction: str) -> dict[str, dict[str, Any]]:
    """The fields of each message of a direction, by its type, as in the sample."""
    bodies = [unpack(samples.frames_of(sample)[1])[0] for sample in samples.allowed(direction)]
    return {body["type"]: body for body in bodies}


@st.composite
def _messages(draw: st.DrawFn, direction: str) -> Any:
    """A known type, some of its fields as they should be and others not."""
    fields = _fields(direction)
    body = dict(fields[draw(st.sampled_from(sorted(fields)))])
    for name in draw(st.lists(st.sampled_from(sorted(body)), max_size=3)):
        body[name] = draw(VALUES)
    for name in draw(st.lists(st.sampled_from(sorted(body)), max_size=2)):
        body.pop(name, None)
    return body


@st.composite
def bundles(draw: st.DrawFn, direction: str) -> Frames:
    """The frames of a control message of this direction, or of something like one."""
    body = draw(st.one_of(st.lists(_messages(direction), max_size=4), st.lists(VALUES, max_size=3), VALUES))
    header = draw(st.sampled_from([codec.MAGIC + samples.SESSION] * 8 + [b"", b"llb", codec.MAGIC]))
    data = draw(st.one_of(st.just(pack(body)), st.just(pack(body)[:-1]), st.binary(max_size=60)))
    return [header, data, *draw(st.lists(st.binary(max_size=20), max_size=3))]


#: Frames of the token planes: a head that is one, and a body that may be none.
CHUNKS = st.builds(
    lambda head, first, count, flags, body: head + first.to_bytes(4, "big") + count.to_bytes(2, "big") + flags + body,
    st.sampled_from([b"T" + samples.KEY, b"B" + samples.KEY, b"T" + bytes(24)]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**16 - 1) | st.integers(0, 3),
    st.binary(min_size=1, max_size=1),
    st.one_of(VALUES.map(pack), st.lists(st.lists(_SCALARS, max_size=3), max_size=3).map(pack), st.binary(max_size=30)),
)
