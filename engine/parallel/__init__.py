"""The mesh: its axes, and how every array is sharded over it."""
