"""The mesh, a batch on it, and sums over it: how every array is sharded."""
