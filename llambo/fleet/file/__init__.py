"""fleet.toml: its keys, its reader, and the versions of it."""
