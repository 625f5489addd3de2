"""A few DPO steps of a real model on real pairs: our arrangements of a batch, and TRL.

    python -m bench.step.peers --model DIR --rows FILE.jsonl|long-tailed
        [--trl-python PYTHON] [--steps 3] [--batch 4] [--max-length 512]

Full training in float32 with AdamW, sequences in file order, each side as its user
would run it, in a process of its own, one after another. Ours: each sequence in a
padded row (`padded`), one row of all sequences (`packed`), a row for each pair whose
beginning goes through the model once (`shared`), and both. TRL with and without
gradient checkpointing; its environment is that of tests/fixtures/README.md.

    seconds       the sum over the same steps of each side; ours has compiled before
                  the first of them, and `compile_seconds` says how long
    peak_bytes    the most memory that the process ever had
    model_tokens  tokens through the policy in those steps, padding included (ours);
                  of which tokens are those of sequences, shared ones counted twice
    losses        of the steps; the sides have to agree to 1e-3

`long-tailed` is 64 pairs of words whose numbers are lognormal (sigma 1.2).

Goals: both arrangements together take at most 0.65 of the time of the faster TRL, and
0.40 of the memory of the smaller one. Exits with 1 where one is missed.
"""

import argparse
import itertools
import json
import logging
import os
import random
import re
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import processes, rows

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    "XLA_FLAGS": None,
}
OURS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True},
    "shared": {"share_prompt": True},
    "both": {"packing": True, "share_prompt": True},
}
# Their names, and what their script calls them.
TRL = {"TRL": "checkpointing", "TRL, no checkpointing": "none"}
TIME_GOAL, MEMORY_GOAL = 0.65, 0.40
TOLERANCE = 1e-3  # of a loss: float32 on each side, and weights that differ by as much


def train(side: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Our trainer's steps, in this process."""
    # As with those who have a CPU alone: not the plugins that tests compile with.
    for name in ("libtpu", "jax_plugins", "jax_cuda13_plugin"):
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    import jax
    from transformers import AutoTokenizer

    from engine import DPOConfig, DPOTrainer, load_model
    from engine.parallel.sharding import make_mesh

    messages = Messages()
    logging.getLogger("engine").addHandler(messages)
    logging.getLogger("engine").setLevel(logging.INFO)
    lines = Path(args.rows).read_text().splitlines()
    trainer = DPOTrainer(
        model=load_model(args.model, mesh=make_mesh(), dtype="float32"),
        arguments=DPOConfig(
            save_directory=folder,
            total_batch_size=args.batch,
            max_training_steps=args.steps,
            max_length=args.max_length,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            shuffle_train_dataset=False,
            log_steps=1,
            use_tensorboard=False,
            progress_bar=False,
            **OURS[side],
        ),
        train_dataset=[json.loads(line) for line in lines],
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    batches = itertools.islice(trainer.plan.batches(), args.steps)
    tokens = sum(batch.rows.tokens.size for batch, *_ in batches)
    trainer.train()
    text = Path(folder, "metrics.jsonl").read_text()
    steps = [x for x in map(json.loads, text.splitlines()) if "loss" in x]
    return {
        "losses": [line["loss"] for line in steps],
        "seconds": sum(line["perf/step_seconds"] for line in steps),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "compile_seconds": sum(messages.compiled),
        "model_tokens": tokens,
        "tokens": steps[-1]["num_tokens"],
        "version": f"jax {jax.__version__}",
    }


class Messages(logging.Handler):
    """The seconds that the trainer says it has compiled for."""

    def __init__(self):
        super().__init__()
        self.compiled: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Look at one message."""
        if found := re.search(r"compiled in ([\d.]+) s", record.getMessage()):
            self.compiled.append(float(found[1]))


def long_tailed(path: Path, pairs: int = 64) -> None:
    """Rows of random words."""
    rng = random.Random(0)
    words = (
        "a day of the long river and its old town by night as we went on to see".split()
    )

    def text() -> str:
        count = max(1, round(rng.lognormvariate(4.0, 1.2)))
        return " ".join(rng.choices(words, k=count))

    made = [
        {"prompt": text() + "\n", "chosen": text(), "rejected": text()}
        for _ in range(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))


def ask(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """A side's answer, from a process of its own."""
    if side in OURS:
        words = ["--side", side, "--model", args.model, "--rows", args.rows]
        words += ["--steps", str(args.steps), "--batch", str(args.batch)]
        words += ["--max-length", str(args.max_length)]
        return processes.ask("bench.step.peers", words, ENVIRONMENT)
    numbers = [str(x) for x in (args.steps, args.batch, args.max_length)]
    words = [args.model, args.rows, *numbers, TRL[side]]
    return processes.ask("bench.step.peers_trl", words, {}, args.trl_python)


def compare(args: argparse.Namespace) -> list[rows.Row]:
    """A row for each side."""
    config = json.loads(Path(args.model, "config.json").read_text())
    answers = {}
    for side in (*OURS, *(TRL if args.trl_python else ())):
        answers[side] = ask(side, args)
        print(side, answers[side], file=sys.stderr, flush=True)
    first = answers["padded"]["losses"]
    for side, answer in answers.items():
        for ours, theirs in zip(first, answer["losses"], strict=True):
            assert abs(ours - theirs) <= TOLERANCE, f"{side}: {answer['losses']}"
    return [
        rows.row(
            "DPO steps, real model",
            "dpo_kernels" if side in OURS else "TRL",
            T=answer.pop("model_tokens", None) or 0,
            D=config["hidden_size"],
            V=config["vocab_size"],
            dtype="float32",
            seconds=answer.pop("seconds"),
            peak_bytes=answer.pop("peak_bytes"),
            side=side,
            rows=args.label,
            layers=config["num_hidden_layers"],
            steps=args.steps,
            pairs=args.batch,
            max_length=args.max_length,
            load=os.getloadavg()[0],
            **answer,
        )
        for side, answer in answers.items()
    ]


def met(found: list[rows.Row]) -> bool:
    """Print the table; whether the goals are reached, where TRL is there."""
    of = {row["side"]: row for row in found}
    print(
        rows.table(
            ("side", "s", "peak GB", "tokens through the model", "compiling, s"),
            [
                (
                    side,
                    round(row["ms"] / 1e3, 1),
                    round(row["peak_bytes"] / 1e9, 2),
                    row["T"] or "",
                    row.get("compile_seconds", ""),
                )
                for side, row in of.items()
            ],
        )
    )
    peers = [of[side] for side in TRL if side in of]
    if not peers:
        return True
    seconds = of["both"]["ms"] / min(row["ms"] for row in peers)
    memory = of["both"]["peak_bytes"] / min(row["peak_bytes"] for row in peers)
    print(
        f"\nboth: {seconds:.2f} of the faster TRL's time (goal {TIME_GOAL}), ", end=""
    )
    print(f"{memory:.2f} of the smaller one's memory (goal {MEMORY_GOAL})")
    return seconds <= TIME_GOAL and memory <= MEMORY_GOAL


def main(argv: list[str] | None = None) -> int:
    """Print the table and keep the rows; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.peers")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--trl-python", help="the interpreter of TRL's environment")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--side", choices=OURS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.side is not None:
            processes.answer(train(args.side, args, folder))
            return 0
        args.label = Path(args.rows).name
        if args.rows == "long-tailed":
            args.rows = str(Path(folder, "rows.jsonl"))
            long_tailed(Path(args.rows))
        found = compare(args)
    others = rows.read(rows.RESULTS / "peers.json")
    kept = [row for row in others if row["rows"] != args.label]
    right = met(found)
    print(f"\nwrote {rows.write('peers', [*kept, *found])}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
