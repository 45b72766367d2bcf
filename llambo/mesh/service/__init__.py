"""What a long-running process owes its host: sd_notify, socket activation, the journal, numbers for Prometheus."""
