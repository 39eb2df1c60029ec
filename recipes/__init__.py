"""Recipes: YAML files that train a model to think shorter, and the code that runs them."""
