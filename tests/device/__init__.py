"""Stand-ins for what only a machine with a GPU has."""
