"""Servers of their own that answer rows in place of the model in this process."""
