"""What to do: plan and placement, autoscaling, crashes, rolling updates. Pure functions of values."""
