"""Native CPU kernels: one C call runs a whole step over packed weights and paged K/V."""
