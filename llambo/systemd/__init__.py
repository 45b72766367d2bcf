"""Units for systemd, what they need beside them, and what puts them in their places."""
