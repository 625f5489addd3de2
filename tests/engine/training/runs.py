"""Small training runs, and what the tests of training look at."""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from transformers import AutoTokenizer

from engine import DPOConfig, DPOTrainer, LoraConfig, load_model
from engine.parallel.sharding import make_mesh
from engine.training.events import Listener
from tests.engine.tiny_models import mesh_of
from tests.json_lines import read_lines

FIXTURE = Path(__file__).parents[2] / "fixtures" / "trl" / "text"
ROWS = read_lines(FIXTURE / "data.jsonl")
# Of 16 and 24 tokens, so that their batches have one shape: a run of these compiles one
# step, where one of all rows compiles up to four.
SHORT = [ROWS[i] for i in (0, 1, 3, 4, 9, 10, 11, 13, 15, 16, 20)]
ONE_SHAPE = (SHORT * 2)[: len(ROWS)]


def one_device() -> Mesh:
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def make_trainer(
    directory: Path,
    evaluate: bool = True,
    eval_dataset: Any = None,
    train_dataset: Any = ONE_SHAPE,
    reference_model: Any = None,
    model: Any = None,
    lora: LoraConfig | None = None,
    listeners: tuple[Listener, ...] = (),
    dtype: str = "float32",
    sizes: tuple[int, ...] = (1, 1, 1),
    **settings,
) -> DPOTrainer:
    mesh = mesh_of(sizes)
    defaults = {"total_batch_size": 4, "learning_rate": 1e-3, "log_steps": 2}
    if evaluate and eval_dataset is None:
        eval_dataset = SHORT[:6]
    return DPOTrainer(
        model=model or load_model(FIXTURE / "model", mesh=mesh, dtype=dtype),
        reference_model=reference_model,
        arguments=DPOConfig(save_directory=str(directory), **defaults | settings),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=AutoTokenizer.from_pretrained(FIXTURE / "model"),
        lora=lora,
        listeners=listeners,
    )


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the functions that XLA compiles meanwhile."""
    names: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            found = re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage())
            if found:
                names.append(found[1])

    logger = logging.getLogger("jax._src.interpreters.pxla")
    handler, level = Handler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield names
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
