"""`llambo fleet`."""
