"""Real brokers, workers and clients, faults by a seeded schedule, and a checker that reads the history afterwards."""
