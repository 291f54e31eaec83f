"""Scoring answers; refuses to know how they were produced."""
