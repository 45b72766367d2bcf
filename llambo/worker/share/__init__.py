"""Files of models between hosts: what a host gives to others, and how it fetches a model from several at once."""
