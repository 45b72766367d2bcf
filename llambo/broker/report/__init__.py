"""What the broker tells about itself: queries, history, metrics. Reads the state and changes none of it."""
