"""Time and memory of a whole DPO step on the CPU, beside plain JAX."""
