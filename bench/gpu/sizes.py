"""The shapes of a run on a GPU, and how much time each section may take.

Imports neither JAX nor torch.
"""

from bench.device.plan import MIB, Plan, Shape

BACKENDS = ("mosaic_gpu", "triton")  # those that are for GPUs, the fastest first


def _sweep(T: int, D: int, V: int, Ts: list[int], Vs: list[int]) -> tuple[Shape, ...]:
    return tuple([(T, D, v) for v in Vs] + [(t, D, V) for t in Ts])


REAL = Plan(
    shapes=(
        (4096, 4096, 128256),
        (8192, 2304, 256000),
        (4096, 4096, 151936),
        (16384, 8192, 128256),
    ),
    with_truth=((4096, 4096, 128256), (8192, 2304, 256000)),
    small=((1024, 4096, 128256), (2048, 4096, 128256)),
    sweep=_sweep(4096, 4096, 128256, [16384, 1024], [524288, 32768])
    + _sweep(4096, 4096, 128256, [8192, 2048], [262144, 65536]),
)
REHEARSAL = Plan(
    shapes=((64, 32, 301), (48, 16, 515)),
    with_truth=((64, 32, 301),),
    small=((16, 32, 301),),
    sweep=_sweep(64, 32, 301, [32], [128, 603]),
    keeping=(1024 * MIB,),
    runs=3,
    rounds=2,
    slice_s=0.002,
    settle_s=0.0,
    hang_s=300.0,
)

# Seconds, in the order of running; what one leaves over is the next ones'.
BUDGETS = {
    "correctness": 80,
    "truth": 30,
    "speed": 110,
    "peers": 50,
    "step": 75,
    "sanitizer": 45,
    "sweep": 40,
    "sweep_peers": 30,
}
LIMIT_S = 470  # of the whole
