"""Fleets: which workers there should be, and how they come to be there. A client of the bus like any other."""
