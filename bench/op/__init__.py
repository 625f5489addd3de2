"""Time and memory of the op alone, beside plain JAX."""
