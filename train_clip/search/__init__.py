"""Extension: embed images or captions into a file, and search it."""
