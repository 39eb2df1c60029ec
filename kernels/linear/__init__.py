"""A linear layer of few rows: what a decode step reads all weights for."""
