"""The dashboard: its page, and one view of the mesh for all who watch it."""
