"""The HTTP APIs: what each reads, and what it answers. No sockets, no mesh."""
