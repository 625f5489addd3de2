"""Measurements of time and memory beside what plain JAX takes; see README.md."""
