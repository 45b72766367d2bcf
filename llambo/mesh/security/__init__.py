"""Keys and API tokens: the files they are in, and what they allow."""
