"""Real containers of compose.yaml, where a Docker engine answers. `scripts/test-compose` runs all of it."""
