"""One script a topic, all through :mod:`benchmarks.harness`; what they measured lies in ``benchmarks/results/``."""
