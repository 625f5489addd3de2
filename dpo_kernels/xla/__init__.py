"""Plain JAX in pieces: runs anywhere, and is the second opinion."""
