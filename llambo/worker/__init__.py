"""The worker: an agent that talks to brokers, and an engine child that runs the model."""
