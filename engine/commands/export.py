"""`dpo export`: a trained adapter and its base as one model."""

import logging
import math
from pathlib import Path

import jax

from engine.errors import InputError
from engine.models import (
    check_adapter,
    check_checkpoint,
    check_save_directory,
    load_adapter,
    load_model,
    merged,
    resolve_directory,
    save_pretrained,
)
from engine.models.checkpoint import ADAPTER_CONFIG, is_tokenizer_file, read_json
from engine.models.tokenizer import load_tokenizer
from engine.parallel.sharding import make_mesh

logger = logging.getLogger(__name__)


def main(
    adapter: str, directory: str, *, model: str | None = None, dtype: str | None = None
) -> None:
    """Write a model whose weights are W + scale B A, in Hugging Face form.

    Args:
        adapter: a PEFT adapter's directory or hub id.
        directory: where the model goes.
        model: the base; None: the one that the adapter names.
        dtype: of the weights on disk; None: the base's own.
    Raises:
        InputError: an adapter or a base that cannot be read, or do not fit each other.
    """
    source = resolve_directory(adapter, "adapter")
    base = model or _named_base(source)
    check_save_directory(directory, {"--merge": adapter, "--model": base})
    config = check_checkpoint(resolve_directory(base))
    check_adapter(source, config, base)
    has_tokenizer = any(is_tokenizer_file(path.name) for path in source.iterdir())
    tokenizer = load_tokenizer(source if has_tokenizer else base)
    # In the file's own dtype, which has all of its digits, if all of it is of one.
    found = set(config.origin.dtypes.values()) if config.origin else set()
    stored = found.pop() if len(found) == 1 else "float32"
    devices = jax.devices()
    devices = devices[: math.gcd(len(devices), config.hidden_size)]
    mesh = make_mesh(devices=devices)
    whole = load_model(base, mesh=mesh, dtype=stored, param_dtype=stored)
    whole = merged(load_adapter(whole, source))
    save_pretrained(whole, directory, tokenizer=tokenizer, dtype=dtype)
    logger.info("saved the merged model and its tokenizer in %s", directory)


def _named_base(adapter: Path) -> str:
    path = adapter / ADAPTER_CONFIG
    name = read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{path}: base_model_name_or_path names no model; give the adapter's base "
            "with --model"
        )
    return name
