"""Who may connect and ask: the answers to ZeroMQ, and the permissions of a role."""
