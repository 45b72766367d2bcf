"""Carrying out what was decided: the keeper, rolling updates, the orchestrator."""
