"""The llama.cpp engine: bindings, loading, prompts, grammars, batching, sampling. Runs in the engine child only."""
