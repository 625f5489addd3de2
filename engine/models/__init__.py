"""One decoder for every supported family, its weights on disk and in memory."""

from engine.models.architecture import DecoderConfig
from engine.models.decoder import Decoder
from engine.models.families import parse_hf_config
from engine.models.init import abstract_model, init_model
from engine.models.save import save_pretrained
from engine.models.weights import load_model

__all__ = [
    "Decoder",
    "DecoderConfig",
    "abstract_model",
    "init_model",
    "load_model",
    "parse_hf_config",
    "save_pretrained",
]
