"""The commands: `llambo`, `llambo-broker`, `llambo-worker`. The only place that knows flags."""
