"""Pallas kernels for TPU v5e, v5p, v6e and 7x."""
