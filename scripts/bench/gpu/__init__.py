"""What `scripts/gpu-check` does on a machine with a GPU: tests, the sanitizer's pass, benchmarks, faults.

Each part runs in a process of its own, under a limit of time; its results are kept as they come.
"""
