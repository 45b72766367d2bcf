"""The host: a process that runs workers on demand, one for each loaded model."""
