"""Answers on their way from the mesh to HTTP, in no API in particular."""
