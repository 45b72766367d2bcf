"""An interface for small programs: lines of JSON, or msgpack objects, on a Unix socket. A client of the mesh."""
