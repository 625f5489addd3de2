"""What the TPU generations can do: clock, matrix unit, memory, cores of a device.

Peaks are those of `jax/_src/tpu_info.py`. On v5e, v5p and v6e the clock times FLOP per
cycle gives them. On 7x the schedule shows matrix units of 524,288 FLOP a cycle.

Fitted to the device times that tokamax 0.0.17 publishes (see `bench.tpu.peers`): 7x's
clock of 1.9 GHz (so that no kernel passes 86% of its peak); the share of HBM's
bandwidth that a kernel gets, on v6e (four backwards) and 7x (one); what the jump back
to the start of a long loop costs, on v6e and 7x (their forwards), nothing on v5p. No
time is published for v5e, and on v5p none that HBM binds: their shares are assumed.

A JAX device is one core on v5e, v6e and 7x (a 7x chip is two devices, each with half of
the chip's memory bandwidth) and two cores, a "megacore", on v5p.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU generation; bandwidth is a device's, the rest a core's."""

    topology: str  # for jax.experimental.topologies
    hertz: float
    flop_per_cycle: int  # bfloat16, of a core
    peak_tflops: float  # bfloat16, of a device
    cores: int  # of a JAX device
    hbm_bytes_per_s: float  # of a JAX device
    hbm_share: float  # of that bandwidth, what a kernel gets
    jump_s: float  # lost at the jump back in a long loop
    matrix_side: int  # of one matrix unit
    delay_slots: int  # cycles after a branch that run whichever way it goes

    @property
    def core_bytes_per_cycle(self) -> float:
        """HBM traffic that one core gets while its siblings take the same."""
        return self.hbm_share * self.hbm_bytes_per_s / self.cores / self.hertz

    @property
    def row_flop(self) -> int:
        """FLOP of one row of a `vmatmul`."""
        return 2 * self.matrix_side**2

    @property
    def row_cycles(self) -> float:
        """Cycles that a row takes at least: every matrix unit busy, bfloat16 rate."""
        return self.row_flop / self.flop_per_cycle


CHIPS = {
    "v5e": Chip(
        topology="v5e:4x4",
        hertz=1.5e9,
        flop_per_cycle=131_072,
        peak_tflops=196.6,
        cores=1,
        hbm_bytes_per_s=820e9,
        hbm_share=0.8,
        jump_s=0,
        matrix_side=128,
        delay_slots=4,
    ),
    "v5p": Chip(
        topology="v5p:2x2x1",
        hertz=1.75e9,
        flop_per_cycle=131_072,
        peak_tflops=458.8,
        cores=2,
        hbm_bytes_per_s=2765e9,
        hbm_share=0.8,
        jump_s=0,
        matrix_side=128,
        delay_slots=4,
    ),
    "v6e": Chip(
        topology="v6e:2x2",
        hertz=1.75e9,
        flop_per_cycle=524_288,
        peak_tflops=917.5,
        cores=1,
        hbm_bytes_per_s=1640e9,
        hbm_share=0.77,
        jump_s=2e-07,
        matrix_side=256,
        delay_slots=4,
    ),
    "7x": Chip(
        topology="tpu7x:2x2x1",
        hertz=1.9e9,
        flop_per_cycle=524_288,
        peak_tflops=1153.4,
        cores=1,
        hbm_bytes_per_s=3690e9,
        hbm_share=0.85,
        jump_s=1.4e-07,
        matrix_side=256,
        delay_slots=6,
    ),
}
