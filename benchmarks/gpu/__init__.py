"""The kit that measures the suite on a machine with a GPU; `python -m benchmarks.gpu --help`."""
