"""The options of a run: their types, defaults, bounds and meanings, and the rules between them."""
