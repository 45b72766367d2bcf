"""The settings: one table for flags, environment variables and `llambo.toml`."""
