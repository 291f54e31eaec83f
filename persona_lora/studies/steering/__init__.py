"""How a trait moves with the coefficient, and how far the model diverges."""
