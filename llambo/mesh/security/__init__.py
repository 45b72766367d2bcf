"""Keys and API tokens: the files they are in, and the limits of an identity."""
