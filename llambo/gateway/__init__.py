"""HTTP: what other programs expect of a model server, in front of a mesh. A client of the bus like any other."""
