"""A run's step for devices that need not be here: what it holds, moves and takes."""
