"""Every size the protocol bounds, with its unit last in the name.

These are the limits of protocol version 1: both ends rely on them, so they are not settings.
What an operator may tune (queue length, leases, caps on memory) lives in `llambo.mesh.settings.settings`.
"""

from __future__ import annotations

#: A request id. Chosen by the client, random, so nobody can guess another one's.
REQUEST_ID_BYTES = 16
#: A dispatch id: attempt number (u32) and four random bytes. It is the fence.
DISPATCH_ID_BYTES = 8
#: Both together: one run of one request.
RUN_KEY_BYTES = REQUEST_ID_BYTES + DISPATCH_ID_BYTES
#: A session id, the proof that a control message belongs to a welcomed link.
SESSION_ID_BYTES = 8
#: A client's topic on the token plane. Knowing it is not enough, it must also be granted.
TOPIC_BYTES = 16

#: Messages bundled in one control message.
BUNDLE_MESSAGES = 256
#: The msgpack body of one control message.
CONTROL_BODY_BYTES = 1024 * 1024
#: A prompt, as it travels in its own frame.
PROMPT_BYTES = 4 * 1024 * 1024
#: Any single frame on the control plane; libzmq drops the peer that sends a longer one.
CONTROL_FRAME_BYTES = PROMPT_BYTES + 4096
#: Any single frame on the token plane.
TOKEN_FRAME_BYTES = 256 * 1024
#: Any single frame from a subscriber: a subscription, or a part of a handshake.
SUBSCRIPTION_FRAME_BYTES = 1024
#: Chunk bytes in one page of a replay.
PAGE_BYTES = 256 * 1024
#: Token chunks in one page of a replay.
PAGE_CHUNKS = 4096
#: Tokens in one chunk.
CHUNK_TOKENS = 4096
#: The answer to a query, or the result of a task, all pages together.
RESULT_BYTES = 4 * 1024 * 1024
#: The result of a task comes in pieces of so many bytes (the last one may be shorter).
RESULT_PIECE_BYTES = 16 * 1024
#: Pieces of one result.
RESULT_PIECES = RESULT_BYTES // RESULT_PIECE_BYTES
#: Texts whose embeddings one task may ask for.
EMBED_INPUTS = 2_048

#: Names of workers, clients, models and classes.
NAME_CHARS = 128
#: The open part of a request: sampling options the broker passes on unread.
SAMPLING_BYTES = 64 * 1024
#: Stop strings per request, and characters in one of them.
STOP_STRINGS = 16
STOP_CHARS = 256
#: The message that tells a model how to behave.
SYSTEM_CHARS = 16 * 1024
#: A grammar or a JSON schema; a longer one, nested deeply, has crashed llama.cpp's parser.
GRAMMAR_CHARS = 16 * 1024
#: How deep a grammar or a JSON schema may be nested.
GRAMMAR_DEPTH = 100
#: Tools a model may be told of.
TOOLS = 128
#: Calls of tools in one answer.
TOOL_CALLS = 16
#: Likeliest tokens that may be told beside each token of an answer.
TOP_LOGPROBS = 20
#: The text of one of those; a longer one is cut.
LOGPROB_PIECE_BYTES = 256
#: Token ids with a bias.
LOGIT_BIASES = 1024
#: The largest `max_tokens` a client may ask for.
MAX_TOKENS = 131_072
#: Beyond any index of a token.
TOKEN_INDEX = 2**31
#: Beyond any number of a beat.
BEAT_NUMBER = 2**53
#: Models one worker may announce.
MODELS_PER_WORKER = 32
#: Slots one worker may announce: its claims have to fit into one heartbeat.
SLOTS_PER_WORKER = 16_384
#: Chunks kept out of order while a gap before them is repaired.
STASH_CHUNKS = 64

#: The longest lease: so long a broker that has just begun waits before it believes that nobody has one.
LEASE_MS = 5_000
#: Leases a broker keeps, and models that one may promise.
LEASES = 16
PROMISED_MODELS = 1_000

#: What the broker remembers about one request's life.
STORY_ENTRIES = 64
