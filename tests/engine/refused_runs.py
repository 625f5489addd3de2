"""Run files, options and command lines that are refused, and what is said of them."""

from pathlib import Path
from typing import Any

from tests.engine.refusals import Case, remove, write

CONFIG = "config: {model: {name_or_path: model}, mixture: {informs: [{data_files: x}]}"
DOTTED: Any = {"trainer.beta": 0.2}
YAML = "run.yaml: not valid YAML: "


def yaml_text(text: str | bytes):
    return write("run.yaml", text)


def a_folder_of_that_name():
    Path("run.yaml").unlink()
    Path("run.yaml").mkdir()


def laughs():
    """Nine levels of nine aliases each: 3 GB, if they were written out."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(9):
        levels.append(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]")
    Path("run.yaml").write_text("\n".join(levels))


RUN_FILES = {
    "syntax": Case(f"{YAML}...line 2, column 1", yaml_text("config: {\n")),
    "tabs": Case(f"{YAML}found character '\\t'...line 2", yaml_text("config:\n\ta: 1")),
    "two documents": Case(
        f"{YAML}a second document begins (---), and a run has one, line 2, column 1",
        yaml_text(CONFIG + "}\n---\na: 1\n"),
    ),
    "empty": Case("run.yaml: is empty; expected the keys `config:`", yaml_text("")),
    "a folder": Case(
        "run.yaml: cannot be read (Is a directory)", a_folder_of_that_name
    ),
    "Latin-1": Case(
        "run.yaml: cannot be read (not UTF-8 text); give a YAML file",
        yaml_text("config: é".encode("latin-1")),
    ),
    "a list": Case("run.yaml: holds a list; expected the keys", yaml_text("- a\n")),
    "a key twice": Case(
        f"{YAML}the key 'beta' is given twice, line 1, column 98",
        yaml_text(CONFIG + ", trainer: {beta: 1, beta: 2}}"),
    ),
    "a merged key twice": Case(
        f"{YAML}the key 'beta' is given twice",
        yaml_text("a: &a {beta: 1, beta: 2}\nconfig: {trainer: {<<: *a}}"),
    ),
    "an alias within itself": Case(
        f"{YAML}an alias within itself, line 1", yaml_text("config: &c {model: *c}")
    ),
    "aliases that multiply": Case(
        f"{YAML}its aliases stand for over 100000 values, line 6", laughs
    ),
    "a Python object": Case(
        f"{YAML}could not determine a constructor for the tag 'tag:yaml.org,2002:"
        "python/object/apply:os.mkdir', line 1",
        yaml_text("config: !!python/object/apply:os.mkdir [ran]\n"),
    ),
    "a date that is none": Case(
        f"{YAML}month must be in 1..12...line 1, column 9",
        yaml_text("config: 2024-13-01\n"),
    ),
    "a number of 5000 digits": Case(
        f"{YAML}Exceeds the limit (4300 digits)...line 1",
        yaml_text(CONFIG + ", trainer: {seed: " + 5000 * "1" + "}}"),
    ),
    "no such file": Case("run.yaml: there is no such file", remove("run.yaml")),
}

OPTIONS = {
    "an unknown section": Case(
        "run.yaml: unknown key trianer; did you mean 'trainer'?", trianer={}
    ),
    "an unknown key": Case(
        "run.yaml: unknown key trainer.learning_rat; did you mean "
        "'trainer.learning_rate'?",
        trainer={"learning_rat": 1},
    ),
    "a key with a line break": Case(
        r"run.yaml: unknown key 'trainer.be\nta'; did you mean 'trainer.beta'?",
        trainer={"be\nta": 1},
    ),
    "a dotted key in a file": Case(
        "run.yaml: unknown key trainer.beta; sections are nested in a file: "
        "`trainer:`, then `beta:`",
        **DOTTED,
    ),
    "a list for a number": Case(
        "run.yaml: trainer.beta=[1] must be a finite number", trainer={"beta": [1]}
    ),
    "a word for a number": Case(
        "command line: trainer.beta='small' must be a finite number",
        overrides=("trainer.beta=small",),
    ),
    "an octal number": Case(
        "command line: trainer.beta='010' must be a finite number",
        overrides=("trainer.beta=010",),
    ),
    "out of range": Case(
        "run.yaml: trainer.beta=-1.0 must be greater than 0", trainer={"beta": -1}
    ),
    "above a range": Case(
        "run.yaml: trainer.label_smoothing=0.5 must be at least 0 and below 0.5",
        trainer={"label_smoothing": 0.5},
    ),
    "too large": Case(
        f"run.yaml: trainer.total_batch_size={10**30} is too large; give a smaller one",
        trainer={"total_batch_size": 10**30},
    ),
    "infinite": Case(
        "command line: trainer.learning_rate='1e999' must be a finite number",
        overrides=("trainer.learning_rate=1e999",),
    ),
    "two lengths of warm-up": Case(
        "run.yaml: trainer.warmup_ratio=0.1 has no effect with warmup_steps=3",
        trainer={"warmup_steps": 3, "warmup_ratio": 0.1},
    ),
    "a reference that moves and is kept": Case(
        "run.yaml: trainer.precompute_ref_log_probs=True cannot be with sync_ref_model",
        trainer={"sync_ref_model": True, "precompute_ref_log_probs": True},
    ),
    "a reference that moves, on the host": Case(
        "run.yaml: trainer.offload_ref_model=True cannot be with sync_ref_model=True",
        trainer={"sync_ref_model": True, "offload_ref_model": True},
    ),
    "a reference that is gone, on the host": Case(
        "run.yaml: trainer.offload_ref_model=True has no effect with precompute_ref",
        trainer={"precompute_ref_log_probs": True, "offload_ref_model": True},
    ),
    "a base on the host": Case(
        "offload_ref_model=True has no effect with LoRA where the reference is on",
        trainer={"offload_ref_model": True},
        lora={"r": 2},
    ),
    "a reference that nobody asks": Case(
        "run.yaml: reference_model has no effect with trainer.loss_type='simpo'",
        reference_model={"name_or_path": "model"},
        trainer={"loss_type": "simpo"},
    ),
    "LoRA with a reference that moves": Case(
        "run.yaml: trainer.sync_ref_model=True cannot be had with LoRA",
        lora={"r": 2},
        trainer={"sync_ref_model": True},
    ),
    "an evaluation of nothing": Case(
        "run.yaml: trainer.eval_steps=3 has no effect without eval_mixture",
        trainer={"eval_steps": 3},
    ),
    "an option of another schedule": Case(
        "run.yaml: trainer.lr_scheduler_kwargs.power=2.0 ...cosine",
        trainer={"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"power": 2}},
    ),
    "no data": Case("run.yaml: mixture.informs=[] must list", mixture={"informs": []}),
    "weights for other sources": Case(
        "run.yaml: mixture.mixture_weights has 2 entries, but informs has 1",
        mixture={"mixture_weights": [1, 2]},
    ),
    "a stream without an end": Case(
        "run.yaml: trainer.max_training_steps is missing", mixture={"streaming": True}
    ),
}
