"""The runner for GPUs: torch for matrix products, `kernels.cuda` for the rest, a graph for each number of decodes."""
