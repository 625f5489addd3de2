"""Whether a checkpoint's tensors are those of the decoder that its config describes."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from engine.errors import InputError
from engine.models.architecture import EMBEDDING, HEAD, DecoderConfig, Origin
from engine.models.checkpoint import read_config
from engine.models.reader import ROPE_BUFFER, Index, Reader
from engine.models.rope import inverse_frequencies

logger = logging.getLogger(__name__)

_COMPARED_AT_ONCE = 2**23  # elements


def _expected(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    return {
        param.hf_name.format(layer): param.shape
        for param in config.parameters().values()
        for layer in (range(config.num_layers) if param.stacked else [0])
    }


def _summary(names: list[str]) -> str:
    """All names; those that differ in their layer alone are written once."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    plain: list[str] = []
    for name in names:
        parts = re.fullmatch(r"(.*\.layers\.)(\d+)(\..*)", name)
        if parts:
            groups[parts[1], parts[3]].append(int(parts[2]))
        else:
            plain.append(name)
    for (before, after), layers in groups.items():
        layers.sort()
        whole = len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1
        span = f"{layers[0]}..{layers[-1]}" if whole else ",".join(map(str, layers))
        plain.append(before + (f"{{{span}}}" if len(layers) > 1 else span) + after)
    return ", ".join(sorted(plain))


def check_tensors(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], where: Path
):
    """InputError naming every tensor that is missing, extra or of another shape.

    Two kinds may be there although the decoder has no place for them; both are compared
    with what it has, by `compare_unread`: a tied model's head, and rope's frequencies.
    """
    expected = _expected(config)
    if config.tie_word_embeddings and HEAD in shapes:
        expected[HEAD] = expected[EMBEDDING]
    check_shapes(
        expected,
        shapes,
        f"{where}: tensors do not match config.json ({config.model_type})",
    )


def check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    complaint: str,
):
    """InputError with `complaint` and every tensor that is not as expected."""
    extra = [
        name
        for name in shapes
        if name not in expected and not ROPE_BUFFER.fullmatch(name)
    ]
    missing = [name for name in expected if name not in shapes]
    wrong = [
        f"{name} is {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [
        f"{kind}: {text}"
        for kind, text in (
            ("missing", _summary(missing)),
            ("extra", _summary(extra)),
            ("mis-shaped", "; ".join(wrong)),
        )
        if text
    ]
    if problems:
        raise InputError(f"{complaint}: {'; '.join(problems)}")


def open_checkpoint(directory: Path, stack: ExitStack) -> tuple[DecoderConfig, Reader]:
    """The config, and a reader whose tensors fit it."""
    config = read_config(directory)
    reader = Reader(directory, stack)
    if config.tie_word_embeddings and HEAD in reader and EMBEDDING not in reader:
        # Of two names for one tensor, safetensors' torch functions keep either.
        reader.alias(EMBEDDING, HEAD)
    dtypes = reader.dtypes()
    check_tensors(config, reader.shapes(), directory)
    weights = {HEAD, *_expected(config)}
    dtypes = {name: dtype for name, dtype in dtypes.items() if name in weights}
    return replace(config, origin=Origin(directory=directory, dtypes=dtypes)), reader


def check_checkpoint(directory: Path) -> DecoderConfig:
    """The config of a checkpoint whose tensors fit it; reads no weights.

    Raises:
        InputError: all that `load_model` refuses.
    """
    with ExitStack() as stack:
        return open_checkpoint(directory, stack)[0]


def _row_blocks(shape: tuple[int, ...]) -> Iterator[Index]:
    step = max(1, _COMPARED_AT_ONCE // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0])), slice(0, shape[1])


def _equal(reader: Reader, name: str, other: str, shape: tuple[int, ...]) -> bool:
    def block(name: str, index: Index) -> np.ndarray:
        return reader.read(name, index).astype(np.float32)

    blocks = _row_blocks(shape)
    return all(np.array_equal(block(name, i), block(other, i)) for i in blocks)


def compare_unread(config: DecoderConfig, reader: Reader) -> DecoderConfig:
    """Compares what is there beside the parameters; the config that is true of it."""
    shapes = reader.shapes()
    for name, shape in shapes.items():
        if match := ROPE_BUFFER.fullmatch(name):
            layer = None if match[1] is None else int(match[1])
            whole = reader.read(name, tuple(slice(0, size) for size in shape))
            if not _is_rope_of(config, layer, whole):
                logger.warning(
                    "%s: %s holds other frequencies than config.json's rope has; "
                    "config.json counts, as in transformers",
                    reader.directory,
                    name,
                )
    if not config.tie_word_embeddings or HEAD not in reader:
        return config
    if _equal(reader, EMBEDDING, HEAD, shapes[HEAD]):
        return config
    logger.warning(
        "%s: tie_word_embeddings is true, but %s differs from %s: both are kept",
        reader.directory,
        HEAD,
        EMBEDDING,
    )
    return config.untied()


def _is_rope_of(config: DecoderConfig, layer: int | None, stored: np.ndarray) -> bool:
    """Whether these are the frequencies of that layer (None: of any), to rounding."""
    ropes = config.ropes if layer is None else config.ropes[layer : layer + 1]
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        return False
    tolerance = 4 * float(jnp.finfo(stored.dtype).eps)
    for rope in dict.fromkeys(ropes):
        # Old versions scaled positions, so that what they saved is not scaled.
        for kind in (rope, replace(rope, rope_type="default")):
            want = inverse_frequencies(kind, config.head_dim)
            if stored.shape == want.shape and np.allclose(
                stored.astype(np.float32), want, rtol=tolerance, atol=1e-7
            ):
                return True
    return False
