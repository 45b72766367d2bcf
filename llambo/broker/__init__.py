"""The broker: a pure core that decides, and a zmq shell that does."""
