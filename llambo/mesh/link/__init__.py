"""How a peer stays connected to a broker: the sockets, and the link that worker and client share."""
