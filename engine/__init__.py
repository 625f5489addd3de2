"""A lean DPO trainer in JAX: `dpo train run.yaml`, or `DPOTrainer(...)` from Python."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.config.dpo import DPOConfig
    from engine.config.lora import LoraConfig
    from engine.errors import InputError
    from engine.models import init_model, load_model
    from engine.training.dpo_trainer import DPOTrainer

__version__ = "0.1.0"
__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "InputError",
    "LoraConfig",
    "__version__",
    "init_model",
    "load_model",
]

# Imported when first used, so that `dpo --help` and a mistyped key do not wait for jax.
_HOMES = {
    "DPOConfig": "engine.config.dpo",
    "DPOTrainer": "engine.training.dpo_trainer",
    "InputError": "engine.errors",
    "LoraConfig": "engine.config.lora",
    "init_model": "engine.models",
    "load_model": "engine.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
