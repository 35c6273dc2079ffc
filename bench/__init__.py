"""Benchmarks of cute_kernels against its peers; run `python -m bench.forward` in the root."""
