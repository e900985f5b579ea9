"""Convolutions of few channels in Triton beside cuDNN's; `python -m benchmarks.convolutions --out FILE`, on a GPU."""
