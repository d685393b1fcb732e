"""The operations on pages, one set for each device family, and the slow reference that is always right."""
