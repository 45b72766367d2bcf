"""What an answer has to look like: one grammar made from JSON schemas, regular expressions and tools."""
