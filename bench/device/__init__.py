"""What benchmarks of the op on a GPU and on a TPU share: sizes, programs, timing."""
