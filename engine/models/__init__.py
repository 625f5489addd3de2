"""One decoder for every supported family, its weights on disk and in memory."""

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
    "Decoder",
    "DecoderConfig",
    "abstract_model",
    "check_checkpoint",
    "check_save_directory",
    "init_model",
    "load_model",
    "max_positions",
    "parse_hf_config",
    "read_config",
    "resolve_directory",
    "save_pretrained",
]
