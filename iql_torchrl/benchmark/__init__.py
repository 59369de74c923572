"""What `recipes/benchmark.py` and `recipes/benchmark_storage.py` measure."""
