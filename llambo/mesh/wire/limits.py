"""Every limit of the protocol, with its unit last in the name.

These are the limits of protocol version 1: both ends rely on them, so they are not settings. What an operator may tune
(queue length, leases, memory) is in `llambo.mesh.settings.settings_table`.
"""

from __future__ import annotations

#: A request id. Random, chosen by the client, so that other clients cannot guess it.
REQUEST_ID_BYTES = 16
#: A dispatch id: attempt number (u32) and four random bytes.
DISPATCH_ID_BYTES = 8
#: Both together: one run of one request. Tokens count while this key is in the broker's fence.
RUN_KEY_BYTES = REQUEST_ID_BYTES + DISPATCH_ID_BYTES
#: A session id. It proves that a control message belongs to a session.
SESSION_ID_BYTES = 8
#: The topic of a client on the token plane. To know it is not enough: a subscription also needs a grant.
TOPIC_BYTES = 16

#: Messages in one bundle.
BUNDLE_MESSAGES = 256
#: The msgpack body of one bundle.
CONTROL_BODY_BYTES = 1024 * 1024
#: A prompt, which is a frame of its own.
PROMPT_BYTES = 4 * 1024 * 1024
#: Any frame on the control plane; libzmq disconnects a peer that sends a longer one.
CONTROL_FRAME_BYTES = PROMPT_BYTES + 4096
#: Any frame on the token plane.
TOKEN_FRAME_BYTES = 256 * 1024
#: Any frame from a subscriber: a subscription, or a part of a handshake.
SUBSCRIPTION_FRAME_BYTES = 1024
#: Chunk bytes in one page of a replay.
PAGE_BYTES = 256 * 1024
#: Token chunks in one page of a replay.
PAGE_CHUNKS = 4096
#: Tokens in one chunk.
CHUNK_TOKENS = 4096
#: The answer to a query, or the result of a task, all pages together.
RESULT_BYTES = 4 * 1024 * 1024
#: A piece of the result of a task (the last one may be shorter).
RESULT_PIECE_BYTES = 16 * 1024
#: Pieces of one result.
RESULT_PIECES = RESULT_BYTES // RESULT_PIECE_BYTES
#: Texts of one `embed` task.
EMBED_INPUTS = 2_048
#: Documents of one `rerank` task.
RERANK_DOCUMENTS = 2_048

#: A mark of a broker, which its peers hand back unread.
MARK_BYTES = 64
#: Names of workers, clients, models and classes.
NAME_CHARS = 128
#: The sampling options of a request, which the broker passes on unread.
SAMPLING_BYTES = 64 * 1024
#: Stop strings of one request.
STOP_STRINGS = 16
#: One stop string.
STOP_CHARS = 256
#: The system message of the form `user`.
SYSTEM_CHARS = 16 * 1024
#: A grammar or a JSON schema. A longer one, nested deeply, has crashed the parser of llama.cpp.
GRAMMAR_CHARS = 16 * 1024
#: Levels of nesting in a grammar or a JSON schema.
GRAMMAR_DEPTH = 100
#: Tools of one request.
TOOLS = 128
#: Tool calls in one answer.
TOOL_CALLS = 16
#: Likeliest tokens that can be requested for each token of an answer (`logprobs`).
TOP_LOGPROBS = 20
#: The text of one of those tokens; a longer one is cut.
LOGPROB_PIECE_BYTES = 256
#: Token ids in `logit_bias`.
LOGIT_BIASES = 1024
#: The largest `max_tokens` of a request.
MAX_TOKENS = 131_072
#: Greater than any token index.
TOKEN_INDEX = 2**31
#: Greater than any number of a heartbeat or beat.
BEAT_NUMBER = 2**53
#: Models of one worker.
MODELS_PER_WORKER = 32
#: Adapters of one model: with it, and once more under the name of a class, they are the models of one worker.
ADAPTERS = MODELS_PER_WORKER // 2 - 1
#: The name of an adapter.
ADAPTER_CHARS = 64
#: Models that one host can have, stored or loaded.
MODELS_PER_HOST = 512
#: Models that one host has loaded.
LOADED_PER_HOST = 32
#: Who holds one model at one host.
HOLDERS_PER_MODEL = 64
#: What a client calls one of its holders; the broker adds its identity.
HOLDER_CHARS = 48
#: A holder that is no admin counts for so long at most; renewed, for longer.
HOLD_MS = 3_600_000
#: Kinds of memory of one host.
DEVICES_PER_HOST = 32
#: The name of a model at its source.
REF_CHARS = 1_024
#: What a host shows to get files of another.
TICKET_BYTES = 16
#: Models whose files one host is asked about, or asks for, at a time.
FILES_PER_HOST = 32
#: Hosts that one host fetches a file from.
SOURCES_PER_FILE = 16
#: Hosts and models that one host gives files to, by one broker.
FILE_GRANTS = 512
#: Slots of one worker: its claims have to fit into one heartbeat.
SLOTS_PER_WORKER = 16_384
#: Chunks of one stream that are stored out of order while a gap before them is repaired.
STASH_CHUNKS = 64

#: The longest time of a lease. After its start a broker grants no new lease for so long: another peer may hold one.
LEASE_MS = 5_000
#: Leases of one broker.
LEASES = 16
#: Models that the holder of one lease may promise.
PROMISED_MODELS = 1_000

#: Steps in the story of one request.
STORY_ENTRIES = 64
