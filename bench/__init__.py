"""Benchmarks of retainops: `python -m bench.run` measures and reports; README.md says what and how."""
