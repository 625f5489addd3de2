"""Options of the optimizer and of its learning rate: part of the `trainer:` section."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from engine.config.fields import (
    check_count,
    check_float32,
    check_positive,
    check_types,
    check_unused,
    check_within,
    refuses_unknown,
)
from engine.errors import InputError

Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
    "wsd",
]
Ramp = Literal["linear", "cosine", "1-sqrt"]

# What each schedule reads of `lr_scheduler_kwargs`.
_WSD = frozenset(
    ("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type")
    + ("min_lr_ratio", "num_cycles")
)
SCHEDULE_OPTIONS: Mapping[str, frozenset[str]] = {
    "constant": frozenset(),
    "constant_with_warmup": frozenset(),
    "linear": frozenset(),
    "cosine": frozenset({"num_cycles"}),
    "cosine_with_restarts": frozenset({"num_cycles"}),
    "cosine_with_min_lr": frozenset({"num_cycles", "min_lr", "min_lr_rate"}),
    "polynomial": frozenset({"lr_end", "power"}),
    "inverse_sqrt": frozenset({"timescale"}),
    "warmup_stable_decay": _WSD,
    "wsd": _WSD,
}

# What each optimizer reads, beside the learning rate and `weight_decay`.
_ADAM = frozenset({"adam_beta1", "adam_beta2", "adam_epsilon"})
OPTIMIZER_OPTIONS: Mapping[str, frozenset[str]] = {
    "adamw": _ADAM | {"mu_dtype", "nu_dtype"},
    "lion": frozenset({"lion_beta1", "lion_beta2", "mu_dtype"}),
    "adafactor": frozenset(),
    "sgd": frozenset({"sgd_momentum", "sgd_nesterov", "mu_dtype"}),
    "muon": _ADAM | {"muon_momentum", "muon_match_rms", "mu_dtype", "nu_dtype"},
}
# The decay of each first moment that `mu_dtype` is the dtype of.
_DECAYS = {
    "adamw": ("adam_beta1",),
    "lion": ("lion_beta2",),
    "sgd": ("sgd_momentum",),
    "muon": ("muon_momentum", "adam_beta1"),
}
_BFLOAT16_DECAY = 1 - 2.0**-8


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """`lr_scheduler_kwargs`: what transformers' schedules take; None: its default."""

    num_cycles: float | None = None  # waves of a cosine; of restarts a whole number
    min_lr: float | None = None  # where cosine_with_min_lr ends: a rate
    min_lr_rate: float | None = None  # the same as a share of learning_rate
    lr_end: float | None = None  # where polynomial ends (1e-7)
    power: float | None = None  # of polynomial (1)
    timescale: int | None = None  # of inverse_sqrt (warm-up's steps, else 10,000)
    # Of warmup_stable_decay alone.
    num_decay_steps: int | None = None  # steps of the decay, which must be given
    num_stable_steps: int | None = None  # steps before it; None: what is left
    warmup_type: Ramp | None = None  # how the rate rises (linear)
    decay_type: Ramp | None = None  # how it falls (cosine)
    min_lr_ratio: float | None = None  # where it begins and ends, of learning_rate (0)

    def __post_init__(self):
        check_types(self)
        check_positive(self, "num_cycles", "power")
        check_within(self, 0, math.inf, "min_lr", "lr_end")
        check_within(self, 0, 1, "min_lr_rate", "min_lr_ratio")
        check_count(self, "timescale", "num_decay_steps")
        check_count(self, "num_stable_steps", low=0)
        check_float32(self)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The part of `DPOConfig` that says how parameters are moved."""

    # muon: matrices of the layers; embeddings, head, norms and biases by adamw.
    optimizer: Literal["adamw", "lion", "adafactor", "sgd", "muon"] = "adamw"
    learning_rate: float = 1e-6  # the highest of the schedule
    # transformers' schedules (wsd: warmup_stable_decay), after warm-up.
    lr_scheduler_type: Schedule = "linear"
    lr_scheduler_kwargs: ScheduleOptions | None = None  # the schedule's own options
    warmup_steps: int = 0  # optimizer steps from 0 up to learning_rate
    warmup_ratio: float = 0.0  # the same as a share of all steps, rounded up
    weight_decay: float = 0.0  # of matrices and embeddings, not of norms and biases
    max_grad_norm: float | None = 1.0  # clip to this global norm; None or 0: never
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.999  # decay of the second moment
    adam_epsilon: float = 1e-8  # added to the root of the second moment
    lion_beta1: float = 0.9  # of the sign that is taken
    lion_beta2: float = 0.99  # of the momentum that is kept
    sgd_momentum: float = 0.0  # 0: none is kept
    sgd_nesterov: bool = False  # look ahead by the momentum
    muon_momentum: float = 0.95  # Nesterov's
    # Scales a matrix's update to this root mean square, about that of adamw, so that
    # learning_rate fits both; None: by sqrt(max(1, out / in)), as Muon began.
    muon_match_rms: float | None = 0.2
    # How first moments are stored. 8bit: blocks of small floats, as adamw_8bit has
    # elsewhere; norms and biases stay float32.
    mu_dtype: Literal["float32", "bfloat16", "8bit"] = "float32"
    # The same of second moments. What is not float32 is rounded at random: to nearest,
    # their decay by adam_beta2 would round to none, and they would only ever grow.
    nu_dtype: Literal["float32", "bfloat16", "8bit"] = "float32"

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of so many."""
        return self.warmup_steps or math.ceil(total_steps * self.warmup_ratio)

    @property
    def schedule_options(self) -> ScheduleOptions:
        """`lr_scheduler_kwargs`, or all defaults."""
        return self.lr_scheduler_kwargs or ScheduleOptions()

    def _read_schedule_options(self) -> None:
        """In Python they may be a dict."""
        given: Any = self.lr_scheduler_kwargs
        if isinstance(given, Mapping):
            try:
                options = ScheduleOptions(**given)
            except InputError as error:
                raise InputError(f"lr_scheduler_kwargs.{error}") from None
            object.__setattr__(self, "lr_scheduler_kwargs", options)

    def _check_optimizer(self) -> None:
        check_positive(self, "adam_epsilon", "muon_match_rms")
        check_count(self, "warmup_steps", low=0)
        check_within(self, 0, math.inf, "learning_rate")
        check_within(self, 0, math.inf, "weight_decay", "max_grad_norm")
        decays = ("adam_beta1", "adam_beta2", "lion_beta1", "lion_beta2")
        decays += ("sgd_momentum", "muon_momentum")
        check_within(self, 0, 1, "warmup_ratio", *decays)
        for name in decays:
            if np.float32(getattr(self, name)) == 1:
                raise InputError(
                    f"{name}={getattr(self, name)!r} is 1 in float32, in which the "
                    "moments are kept and would never change; give at most 0.9999999"
                )
        if self.warmup_steps and self.warmup_ratio:
            raise InputError(
                f"warmup_ratio={self.warmup_ratio!r} has no effect with warmup_steps="
                f"{self.warmup_steps}; remove one"
            )
        self._check_reads()
        self._check_schedule()

    def _check_reads(self) -> None:
        """Refuse what the optimizer does not have, and what its momentum cannot be."""
        every = frozenset[str]().union(*OPTIMIZER_OPTIONS.values())
        others = every - OPTIMIZER_OPTIONS[self.optimizer]
        if self.optimizer == "adafactor" and self.mu_dtype != "float32":
            raise InputError(
                f"mu_dtype={self.mu_dtype!r} has no effect with optimizer 'adafactor', "
                "which keeps no first moment; remove it"
            )
        check_unused(self, f"with optimizer {self.optimizer!r}", *sorted(others))
        if self.optimizer == "sgd" and not self.sgd_momentum:
            check_unused(self, "without sgd_momentum", "sgd_nesterov", "mu_dtype")
        if self.mu_dtype != "bfloat16":
            return
        for name in _DECAYS[self.optimizer]:
            if getattr(self, name) > _BFLOAT16_DECAY:
                raise InputError(
                    f"{name}={getattr(self, name)!r} cannot be with mu_dtype="
                    "'bfloat16', in which a moment times it rounds to the moment "
                    f"itself; give at most {_BFLOAT16_DECAY}, or another mu_dtype"
                )

    def _check_schedule(self) -> None:
        kind, options = self.lr_scheduler_type, self.schedule_options
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if value is not None and field.name not in SCHEDULE_OPTIONS[kind]:
                takes = ", ".join(sorted(SCHEDULE_OPTIONS[kind])) or "none"
                raise InputError(
                    f"lr_scheduler_kwargs.{field.name}={value!r} has no effect with "
                    f"lr_scheduler_type {kind!r} (it takes: {takes}); remove it"
                )
        cycles = options.num_cycles
        if kind == "cosine_with_restarts" and cycles is not None and cycles % 1:
            raise InputError(
                f"lr_scheduler_kwargs.num_cycles={cycles!r} must be a whole number "
                f"with lr_scheduler_type {kind!r}: it counts restarts"
            )
        if kind == "cosine_with_min_lr":
            self._check_lowest(options)
        end = 1e-7 if options.lr_end is None else options.lr_end
        if kind == "polynomial" and end >= self.learning_rate:
            raise InputError(
                f"lr_scheduler_kwargs.lr_end={end!r} must be below learning_rate="
                f"{self.learning_rate!r}; lower it"
            )
        if _WSD == SCHEDULE_OPTIONS[kind] and options.num_decay_steps is None:
            raise InputError(
                f"lr_scheduler_type {kind!r} needs lr_scheduler_kwargs.num_decay_steps,"
                " the optimizer steps of its decay; give a number"
            )

    def _check_lowest(self, options: ScheduleOptions) -> None:
        if (options.min_lr is None) == (options.min_lr_rate is None):
            raise InputError(
                "lr_scheduler_type 'cosine_with_min_lr' needs one of "
                "lr_scheduler_kwargs.min_lr (a learning rate) and min_lr_rate (a share "
                "of learning_rate), and not both"
            )
        if options.min_lr is not None and options.min_lr > self.learning_rate:
            raise InputError(
                f"lr_scheduler_kwargs.min_lr={options.min_lr!r} must be at most "
                f"learning_rate={self.learning_rate!r}; lower it"
            )
