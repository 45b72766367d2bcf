"""Workers and clients as sessions: joining, heartbeats, leases, speed, draining."""
