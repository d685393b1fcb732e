"""The parts of the benchmarks: request files, engines, figures, report."""
