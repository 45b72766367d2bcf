"""Model files: finding them, reading their heads, naming them."""
