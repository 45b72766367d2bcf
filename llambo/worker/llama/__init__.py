"""The llama.cpp engine: bindings, loading, batching, sampling. Runs in the engine child only."""
