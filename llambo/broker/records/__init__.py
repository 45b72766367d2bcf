"""What the broker knows: its state and the records in it:
they hold data and keep it consistent; rules decide elsewhere."""
