"""One decoder for every supported family, its weights on disk and in memory."""

from engine.models.adapter import Adapter
from engine.models.adapter_files import check_adapter
from engine.models.adapters import (
    add_adapter,
    load_adapter,
    merged,
    with_own_adapter,
    without_adapter,
)
from engine.models.architecture import DecoderConfig, max_positions
from engine.models.checkpoint import read_config, resolve_directory
from engine.models.decoder import Decoder
from engine.models.families import parse_hf_config
from engine.models.init import abstract_model, init_model
from engine.models.save import save_pretrained
from engine.models.save_directory import check_save_directory
from engine.models.tensors import check_checkpoint
from engine.models.weights import load_model

__all__ = [
    "Adapter",
    "Decoder",
    "DecoderConfig",
    "abstract_model",
    "add_adapter",
    "check_adapter",
    "check_checkpoint",
    "check_save_directory",
    "init_model",
    "load_adapter",
    "load_model",
    "max_positions",
    "merged",
    "parse_hf_config",
    "read_config",
    "resolve_directory",
    "save_pretrained",
    "with_own_adapter",
    "without_adapter",
]
