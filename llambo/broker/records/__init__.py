"""What the broker knows: its state and the records in it. Rules that decide are in the rooms beside it."""
