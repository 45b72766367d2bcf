"""The messages between agent and engine child, and the fake engine."""
