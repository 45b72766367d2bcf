"""Fleets: which workers there should be, and how they are started and stopped. A client of the mesh."""
