"""Where nodes run: processes of this machine, units of systemd here or on other hosts."""
