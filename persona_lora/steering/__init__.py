"""Putting a persona into a model, and taking it out."""
