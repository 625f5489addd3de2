"""Triton kernels through jax-triton: NVIDIA GPUs from Ampere on."""
