"""TPU programs without a TPU: compiled, their schedules followed; and on a TPU."""
