"""One room for each question that is asked of models."""
