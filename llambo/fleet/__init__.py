"""Fleets: fleet.toml, and its nodes started, stopped, updated and kept running. A client of the mesh."""
