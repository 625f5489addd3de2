"""Backends of `token_logprobs` by name, and the choice among them."""

from dpo_kernels.backends.choice import Choice
from dpo_kernels.interface import Backend

# From the fastest to the one that runs anywhere: the order in which `auto` tries them.
BACKENDS = {
    "mosaic_gpu": "dpo_kernels.backends.mosaic_gpu",
    "pallas_tpu": "dpo_kernels.backends.pallas_tpu",
    "triton": "dpo_kernels.backends.triton",
    "xla": "dpo_kernels.backends.xla",
}

_choice = Choice[Backend]("token_logprobs", BACKENDS)
load_backend = _choice.load
supported_backends = _choice.supported
