"""The owner of the KV pages: a pure core over shared arrays, and the daemon around it."""
