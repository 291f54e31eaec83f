"""A mixing desk for conversations, in a browser."""
