"""fleet.toml: its schema, its reader, and the versions of its classes."""
