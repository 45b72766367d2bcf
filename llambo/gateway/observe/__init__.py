"""What the gateway measures: metrics and traces."""
