"""The demo: train on preference pairs, and see on held-out prompts what it changed.

`make demo`, or `python examples/demo/run.py [KEY=VALUE ...]` with the overrides that
`dpo train` takes. Exits with 1 where the held-out accuracy stays below the goal.
"""

import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from corpus import VOICES, voice_of
from plot import curve, plot_curves, read_metrics

from engine.cli import main as dpo
from engine.config.run import ModelConfig, load_run_config
from engine.errors import InputError

ROOT = Path(__file__).parents[2]
HERE = Path("examples/demo")  # from the root, where the paths in demo.yaml start
ACCURACY = "eval_rewards/accuracies"
GOAL = 0.9
SHOWN = (0, 1, 2, 3, 23, 56)  # held-out rows: one thing in four voices, then two more
MAX_NEW_TOKENS = 44

INTRODUCTION = f"""\
A small Llama can talk about eighty things (a lighthouse, an owl, a soup) in four voices
({", ".join(VOICES)}), but hardly minds which one it is asked for.
The training pairs ask for a voice and prefer the answer that has it. The held-out pairs
do the same for things that no training pair mentions.
"""


def held_out_rows() -> list[dict]:
    """The held-out pairs as they are in the file."""
    text = (HERE / "heldout.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def answers(directory: str, options: ModelConfig, rows: list[dict]) -> list[str]:
    """What the model in `directory` writes to each row's prompt, greedily."""
    from engine.models import load_model
    from engine.models.generate import greedy_generate
    from engine.models.tokenizer import load_tokenizer

    model = load_model(directory, dtype=options.dtype, remat=options.remat)
    # Its methods' annotations are wider than what they return.
    tokenizer: Any = load_tokenizer(directory)
    prompts = [
        tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for row in rows
    ]
    found = greedy_generate(model, prompts, MAX_NEW_TOKENS, tokenizer.eos_token_id)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def obedient(rows: list[dict], texts: list[str]) -> int:
    """How many texts speak in the voice that the row's prompt asks for."""
    pairs = zip(rows, texts, strict=True)
    return sum(voice_of(row["chosen"][0]["content"]) == voice_of(t) for row, t in pairs)


def before_and_after(rows: list[dict], before: list[str], after: list[str]) -> str:
    """A few prompts, each with what the model wrote before and after training."""
    blocks = []
    for row in SHOWN:
        lines = [
            ("asked", rows[row]["prompt"][0]["content"]),
            ("before", before[row]),
            ("after", after[row]),
        ]
        filled = (
            textwrap.fill(f"  {label:6}  {text}", 88, subsequent_indent=" " * 10)
            for label, text in lines
        )
        blocks.append("\n".join(filled))
    return "\n\n".join(blocks)


def write_generations(
    path: Path, metrics: list[dict], rows: list[dict], before, after
) -> None:
    """The shown prompts and what was written to them, for the report."""
    lines = [
        {"step": step, "prompt": rows[row]["prompt"][0]["content"], "text": texts[row]}
        for row in SHOWN
        for step, texts in ((0, before), (metrics[-1]["step"], after))
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def summary(rows: list[dict], before: list[str], after: list[str], metrics) -> str:
    """The first and the last held-out accuracy, and the prompts that were obeyed."""
    steps, accuracies = curve(metrics, ACCURACY)
    count = len(rows)
    return (
        f"held-out pairs ranked right    step {steps[0]:3}: {accuracies[0]:.2f}    "
        f"step {steps[-1]:3}: {accuracies[-1]:.2f}\n"
        f"answers in the voice asked for   before: {obedient(rows, before)}/{count}"
        f"      after: {obedient(rows, after)}/{count}"
    )


def demo(overrides: list[str]) -> int:
    """Answers, trains, answers again, and writes the comparison."""
    start = time.monotonic()
    run_file = HERE / "demo.yaml"
    config = load_run_config(run_file, overrides)
    output = Path(config.trainer.save_directory)
    rows = held_out_rows()
    print(INTRODUCTION)

    said = f"what the base model answers to {len(rows)} held-out prompts"
    print(f"== before: {said}", flush=True)
    before = answers(config.model.name_or_path, config.model, rows)
    print(f"== training: dpo train {' '.join([str(run_file), *overrides])}", flush=True)
    if code := dpo(["train", str(run_file), *overrides]):
        return code
    print("== after: what the trained model answers to the same prompts", flush=True)
    after = answers(str(output), config.model, rows)

    metrics = read_metrics(output / "metrics.jsonl")
    plot_curves(metrics, output / "curves.png", GOAL)
    comparison = before_and_after(rows, before, after)
    text = f"{comparison}\n\n{summary(rows, before, after, metrics)}\n"
    (output / "before_after.txt").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    write_generations(output / "generations.jsonl", metrics, rows, before, after)
    if code := dpo(["report", str(output)]):
        return code
    print(f"{output}: report.html, metrics.jsonl, the trained model, before_after.txt")
    print(f"the demo took {time.monotonic() - start:.0f} s")
    reached = curve(metrics, ACCURACY)[1][-1]
    if reached < GOAL:
        print(f"held-out accuracy {reached:.2f} is below {GOAL}", file=sys.stderr)
        return 1
    return 0


def main(overrides: list[str]) -> int:
    """The demo, from wherever it is called; bad input is one line and a 2."""
    os.chdir(ROOT)
    # transformers says at import that there is no PyTorch; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return demo(overrides)
    except InputError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
