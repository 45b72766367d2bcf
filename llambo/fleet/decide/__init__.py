"""What to do: plan, placement, autoscaling, crashes, rolling updates. Pure functions of values."""
