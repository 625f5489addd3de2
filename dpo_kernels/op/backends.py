"""Backends of `token_logprobs` by name, and the choice among them."""

from dpo_kernels.op.choice import Choice
from dpo_kernels.op.job import Backend

# From the fastest to the one that runs anywhere: the order in which `auto` tries them.
BACKENDS = {
    "mosaic_gpu": "dpo_kernels.mosaic_gpu.logprobs",
    "pallas_tpu": "dpo_kernels.pallas_tpu.logprobs",
    "triton": "dpo_kernels.triton.logprobs",
    "xla": "dpo_kernels.xla.logprobs",
}

_choice = Choice[Backend]("token_logprobs", BACKENDS)
load_backend = _choice.load
supported_backends = _choice.supported
