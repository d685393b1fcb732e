"""The model store: sources, conversion, cache."""
