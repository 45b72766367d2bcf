"""A door for small programs: lines, or msgpack objects, on a Unix socket. A client of the bus like any other."""
