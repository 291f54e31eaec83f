"""One module, one question."""
