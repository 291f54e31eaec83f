"""How a trait moves with the coefficient, and what it costs."""
