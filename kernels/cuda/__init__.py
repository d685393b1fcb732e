"""Kernels for CUDA devices: `.cu` files compiled at run time, and one Python module for each family of them."""
