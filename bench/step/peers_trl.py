"""A few DPO steps of TRL, for `bench.step.peers`; run by a Python that has it.

    python -m bench.step.peers_trl MODEL ROWS STEPS BATCH MAX_LENGTH CHECKPOINTING

gives `bench.processes` one answer: the loss of each step, the seconds of
all, and the most memory that the process had. Written for Python 3.11, torch
2.13.0 (CPU), transformers 5.23.0, trl 1.16.0, accelerate 1.15.0, datasets 5.2.0.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

import torch  # pyright: ignore[reportMissingImports]
import transformers
import trl  # pyright: ignore[reportMissingImports]
from datasets import Dataset

from bench import processes


class Clock(transformers.TrainerCallback):
    """Seconds from the beginning of each step to its end."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start it."""
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Read it."""
        self.seconds.append(time.perf_counter() - self._began)


def main(words: list[str]) -> None:
    """Train, and print the answer."""
    model, rows, *numbers, checkpointing = words
    steps, batch, max_length = (int(x) for x in numbers)
    lines = Path(rows).read_text().splitlines()
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        arguments = trl.DPOConfig(
            output_dir=output,
            per_device_train_batch_size=batch,
            max_steps=steps,
            max_length=max_length,
            beta=0.1,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_checkpointing=checkpointing == "checkpointing",
            train_sampling_strategy="sequential",
            model_init_kwargs={"dtype": "float32"},
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
        )
        trainer = trl.DPOTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=transformers.AutoTokenizer.from_pretrained(model),
            callbacks=[clock],
        )
        trainer.train()
    answer = {
        "losses": [x["loss"] for x in trainer.state.log_history if "loss" in x],
        "seconds": sum(clock.seconds),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "version": f"trl {trl.__version__}, torch {torch.__version__}",
    }
    processes.answer(answer)


if __name__ == "__main__":
    main(sys.argv[1:])
