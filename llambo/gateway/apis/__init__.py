"""The HTTP APIs: what each reads and answers. No sockets, no mesh."""
