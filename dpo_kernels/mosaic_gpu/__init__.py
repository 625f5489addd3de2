"""Pallas kernels for NVIDIA Hopper: TMA, wgmma, warp-specialised, persistent."""
