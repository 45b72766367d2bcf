"""What an answer has to look like: one grammar made of JSON schemas, patterns and tools."""
