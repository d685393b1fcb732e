"""The kernels against the slow reference, and against themselves bit for bit. Needs a C++ compiler and cmake."""
