"""The bus: messages, their encoding, and how a peer stays connected."""
