"""How far hidden states, and weight changes, point along persona directions."""
