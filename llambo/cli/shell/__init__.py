"""`llambo shell`."""
