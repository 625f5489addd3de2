"""Everything that `make bench-gpu` runs on one GPU; see bench/README.md."""
