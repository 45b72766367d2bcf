"""A client of only pyzmq and msgpack, written from docs/protocol.md alone: it streams one answer.

python examples/raw_client.py [tcp://127.0.0.1:7330] [PROMPT]
"""

import os
import struct
import sys

import msgpack
import zmq

given = sys.argv[1:3]
address, prompt = given + ["tcp://127.0.0.1:7330", "What is AI?"][len(given) :]
context = zmq.Context()
control, tokens = context.socket(zmq.DEALER), context.socket(zmq.SUB)
control.connect(address)
session, request, beat, answer, count, shown = bytes(8), os.urandom(16), 0, {}, None, 0


def send(message, *extra):
    control.send_multipart([b"llb\x01" + session, msgpack.packb([message]), *extra])


def keep(frame):  # "T", request id, dispatch id, first index (u32), count (u16), flags (u8), [ids, pieces]
    answer.update(enumerate(msgpack.unpackb(frame[32:])[1], struct.unpack_from(">I", frame, 25)[0]))


send({"type": "client_hello"})
while count is None or shown < count:
    for socket in zmq.select([control, tokens], [], [])[0]:
        if socket is tokens:
            frame = socket.recv()[16:]  # without the topic
            if frame[:1] == b"T":
                keep(frame)
            elif not beat:  # "B", number (u64), session: the first beat proves the subscription, so submit
                form = {"form": "user"}  # the message of a user, for the chat template of the model
                send({"type": "inference_request", "id": request, "sampling": form, "max_tokens": 64}, prompt.encode())
            beat = struct.unpack_from(">Q", frame, 1)[0] if frame[:1] == b"B" else beat
            continue
        for message in msgpack.unpackb(socket.recv_multipart()[1]):
            match message["type"]:
                case "welcome":
                    session = message["session"]
                    tokens.subscribe(message["topic"])
                    tokens.connect(f"{address.rpartition(':')[0]}:{message['token_port']}")
                case "broker_heartbeat":  # the moment to say that we live, and what we miss
                    send({"type": "client_heartbeat", "echo": beat})
                    if shown < (count or message.get("progress", {}).get(request, 0)):
                        send({"type": "replay", "id": request, "first": shown})
                case "page":
                    for chunk in message["chunks"]:
                        keep(chunk)
                case "end":
                    count = message["count"]
                case "problem":
                    sys.exit(f"{message['error']['code']}: {message['error']['text']}")
    while shown in answer:
        os.write(1, answer[shown])
        shown += 1
send({"type": "end_ack", "ids": [request]})
send({"type": "goodbye"})
print()
context.destroy(linger=200)
