"""Activation vectors: found, and projected on."""
