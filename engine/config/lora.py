"""Options of LoRA: the `lora:` section of a run file, beside `model:`."""

from dataclasses import dataclass
from typing import Literal

from engine.config.dpo import DPOConfig
from engine.config.fields import (
    check_count,
    check_float32,
    check_positive,
    check_types,
    check_unused,
    check_within,
    did_you_mean,
    refuses_unknown,
)
from engine.errors import InputError
from engine.models.adapter import LINEARS, PEFT_TARGETS, Adapter
from engine.paths import expand

_VOCABULARY = ("lm_head", "embed_tokens")


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train an adapter on a frozen model: a new one, or that of `adapter`.

    Names and defaults are those of PEFT's LoraConfig. The model stays in the dtype of
    the computation; `model.param_dtype` is the adapter's.

    Raises:
        InputError: a value of the wrong type, out of range, or without effect.
    """

    r: int = 8  # rank
    lora_alpha: float = 8.0  # the adapter's part is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # of what goes into the adapter, in [0, 1)
    # Names of LINEARS, or all of them.
    target_modules: Literal["all-linear"] | tuple[str, ...] = PEFT_TARGETS
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r)
    # A PEFT adapter to start from, a directory or hub id; what it is is its own matter.
    adapter: str | None = None

    def __post_init__(self):
        check_types(self)
        check_count(self, "r")
        check_positive(self, "lora_alpha")
        check_within(self, 0, 1, "lora_dropout")
        check_float32(self)
        self._check_targets()
        if self.adapter is not None:
            if not self.adapter:
                raise InputError("adapter='' must not be empty")
            object.__setattr__(self, "adapter", expand(self.adapter))
            own = "r", "lora_alpha", "target_modules", "use_rslora"
            check_unused(self, f"as adapter={self.adapter!r} has its own", *own)

    def _check_targets(self):
        targets = self.target_modules
        if isinstance(targets, str):
            return
        allowed = f"allowed: all-linear, or a list of {', '.join(LINEARS)}"
        if not targets:
            raise InputError(f"target_modules=[] names no module; {allowed}")
        for name in targets:
            if name in _VOCABULARY:
                raise InputError(
                    f"target_modules has {name!r}, which can have no adapter here: the "
                    f"vocabulary stays frozen; {allowed}"
                )
            if name not in LINEARS:
                near = did_you_mean(name, LINEARS)
                raise InputError(
                    f"target_modules has {name!r}, which is no linear module of these "
                    f"models{near}; {allowed}"
                )
            if targets.count(name) > 1:
                raise InputError(f"target_modules has {name!r} twice; remove one")

    def new_adapter(self, base: str | None) -> Adapter:
        """The adapter that these options describe; `base`: how its model is named."""
        named = LINEARS if self.target_modules == "all-linear" else self.target_modules
        return Adapter(
            rank=self.r,
            alpha=self.lora_alpha,
            modules=tuple(name for name in LINEARS if name in named),
            rslora=self.use_rslora,
            dropout=self.lora_dropout,
            base=base,
        )


def check_dropout(
    trainer: DPOConfig, dropout: float | None, prefixes: tuple[str, str] = ("", "")
) -> None:
    """Refuse options of training that do not go with LoRA, or that only LoRA has.

    Args:
        dropout: `lora_dropout`; None without LoRA.
        prefixes: what stands before the names of both sections' options.
    Raises:
        InputError: naming both options.
    """
    trainers, loras = prefixes
    if dropout is None:
        if not trainer.disable_dropout:
            raise InputError(
                f"{trainers}disable_dropout=False cannot be had: the models have no "
                "dropout, only LoRA's adapters can (lora_dropout); remove it"
            )
        return
    if dropout and trainer.disable_dropout:
        raise InputError(
            f"{loras}lora_dropout={dropout} has no effect with {trainers}"
            "disable_dropout=True, the default; set disable_dropout to false, or "
            "lora_dropout to 0"
        )
    if not dropout and not trainer.disable_dropout:
        raise InputError(
            f"{trainers}disable_dropout=False has no effect with {loras}lora_dropout=0;"
            " remove it, or drop something"
        )
    if trainer.sync_ref_model:
        raise InputError(
            f"{trainers}sync_ref_model=True cannot be had with LoRA: the reference is "
            "on the base that the policy is on, and must stay as it is; remove one"
        )
