"""Touching a model: loading, structure, generation."""
