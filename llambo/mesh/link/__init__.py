"""How a peer stays connected to a broker: its sockets, and the link that worker and client share."""
