"""The dashboard: its page, and one look at the mesh for all who watch."""
