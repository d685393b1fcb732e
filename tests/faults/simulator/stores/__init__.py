"""Level 1: the manager's core and a scripted executor over the same bytes, killed at every store of either."""
