"""Pools in device memory: who owns it, how it is handed over, and what proves that its last user is dead."""
