"""`llambo top`."""
