"""Who may connect, subscribe and ask: the answers to ZeroMQ, and the permissions of a role."""
