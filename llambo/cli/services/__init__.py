"""The commands that run: broker, worker, gateway, bridge, `up`, and systemd units."""
