"""The bus: what is said, how it is written down, and how a peer stays connected."""
