"""What the broker reports: queries, history, metrics over HTTP and who may read them. It changes none of the state."""
