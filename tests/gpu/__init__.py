"""What only a GPU can show. Skipped as a whole without one."""
