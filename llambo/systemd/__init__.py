"""Units for systemd, as files, and the code that adapts them to a machine."""
