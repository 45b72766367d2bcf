"""What a long-running process needs of its host: the service manager, the journal, metrics for Prometheus, facts."""
