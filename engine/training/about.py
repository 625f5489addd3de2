"""What a run's models are called and how it was configured: for who reads about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config.dpo import DPOConfig
from engine.config.lora import LoraConfig


@dataclass(frozen=True, kw_only=True)
class About:
    """Words about a run, and its configuration."""

    model: str
    reference: str
    dtype: str  # of the computation
    param_dtype: str  # of what is trained
    config: Mapping[str, Any] = field(repr=False)  # sections, as a run file has them


def reference_words(
    arguments: DPOConfig,
    model: str,
    lora: LoraConfig | None,
    *,
    given: bool,
    name: str | None = None,
    adapter: str | None = None,
    dtype: str | None = None,
) -> str:
    """What rewards are measured from.

    Args:
        model: the policy's name.
        given: whether a reference was named or handed over.
        name: its model's; None: it is on the policy's own.
        adapter: the adapter on it.
        dtype: what it computes in; None: as the policy does.
    """
    if arguments.without_reference:
        return f"none ({arguments.without_reference})"
    if given:
        parts = name or model, adapter
        words = " with the adapter ".join(part for part in parts if part)
        return f"{words}, in {dtype}" if dtype else words
    if lora is None:
        return "a frozen copy of the model"
    if lora.adapter is None:
        return "the model without its adapter"
    return f"the model with a frozen copy of {lora.adapter}"
