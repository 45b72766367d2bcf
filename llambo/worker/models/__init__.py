"""Model files: finding them, reading their headers, naming them; GPUs, and which layers of a model go there."""
