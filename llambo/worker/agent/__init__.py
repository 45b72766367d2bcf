"""The agent: the process that talks to brokers, and the core that decides for it. It does not load models."""
