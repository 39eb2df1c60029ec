"""Model families as data: the registry and one file per family."""
