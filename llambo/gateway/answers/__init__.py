"""Answers on their way from the mesh to HTTP, independent of the API that was used."""
