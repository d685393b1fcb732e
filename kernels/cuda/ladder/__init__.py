"""Earlier versions of kernels, kept runnable: each says what it changed."""
