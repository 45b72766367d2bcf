"""The commands of `llambo` that ask the mesh or edit files."""
