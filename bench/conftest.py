"""One process on the CPU, all of its cores in one device."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("XLA_FLAGS", None)
