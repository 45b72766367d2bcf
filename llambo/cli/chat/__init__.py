"""`llambo chat`."""
