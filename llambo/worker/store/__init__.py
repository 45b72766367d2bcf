"""Where model files come from and where they are: names, the caches of Hugging Face and Ollama, downloads."""
