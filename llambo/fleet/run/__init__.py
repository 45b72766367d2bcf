"""Carrying out what was decided: the node manager, updates, the orchestrator and its lease."""
