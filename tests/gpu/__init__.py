"""What needs a GPU, or Mesa's software device in its place. Not part of `make test`: `make gpu-check`."""
