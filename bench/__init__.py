"""The mesh beside bare sockets: `python -m bench` lists what there is. docs/benchmarks.md explains the figures."""
