"""Which model is loaded at which host: the decision, its wishes as state, sessions of hosts, holds of clients."""
