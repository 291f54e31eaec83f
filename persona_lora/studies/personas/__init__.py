"""Which mix of directions speaks like a person."""
