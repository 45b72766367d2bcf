"""What goes over the sockets: messages, chunks of tokens, their limits and errors.

No socket, no clock; imports no other room.
"""
