"""Model files: finding them, reading their headers, naming them."""
