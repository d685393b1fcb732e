"""The CUDA kernels without a GPU: compiled for every architecture, and run on the CPU by a stand-in."""
