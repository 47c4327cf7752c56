"""The benchmarks that `kvbm bench` runs. Each is also a program of its own: `python -m kvbm.bench.disk`."""
