"""Which model is loaded where, and what its requests wait for (decide); wishes, sessions of hosts, holds of clients."""
