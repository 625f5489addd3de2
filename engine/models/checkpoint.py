"""A checkpoint's directory: where it is, its config.json, which files are what."""

import json
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from engine.errors import InputError, library_errors, one_line
from engine.models.families import DecoderConfig, parse_hf_config
from engine.paths import as_path

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "*.safetensors"
_WANTED = [_WEIGHTS, "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_WANTED += ["*.md", "LICENSE*", "NOTICE*"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*"]
_LFS_POINTER = b"version https://git-lfs"

# What any tokenizer is made of; a class may name more in `vocab_files_names`.
MORE_TEMPLATES = "additional_chat_templates"
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model*",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece*.model",
    "tiktoken.model",
    "*.tiktoken",
    "tekken.json",
)
_TOKENIZER_SETTINGS = (
    "tokenizer.*.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template*",
    f"{MORE_TEMPLATES}/*.jinja",
)

# Weights of other formats, and what to do where they are all there is.
_FOREIGN_WEIGHTS = (
    ("model-*-of-*.safetensors", f"shards without their index; fetch {INDEX}"),
    (
        "*.gguf",
        "GGUF, which is quantised; give the safetensors that it was made of",
    ),
    (
        "consolidated*",
        "the original format of Llama or Mistral; give the checkpoint in Hugging Face "
        "form",
    ),
    (
        "pytorch_model*.bin *.pth *.ckpt *.pkl",
        "pickled weights, which run code when they are read, so they are not; convert "
        "them where torch is: transformers' from_pretrained, then save_pretrained",
    ),
    ("*.msgpack *.h5 *.onnx", "weights of another framework; convert them"),
    ("*.safetensors", "weights under another name; rename or merge them"),
)


def resolve_directory(
    path_or_hub_id: str | Path, what: str = "model", weights: bool = True
) -> Path:
    """The local directory of a checkpoint; downloads it where it is a hub id.

    Args:
        what: the directory is to hold, for messages.
        weights: False: what is downloaded is all but these.
    """
    name = str(path_or_hub_id)
    with library_errors(lambda error: f"{what} {name!r}: {one_line(error)}"):
        path = as_path(name)
        is_directory, is_there = path.is_dir(), path.exists()
    if is_directory:
        return path
    if is_there:
        raise InputError(
            f"{what} {name!r} is a file; give the directory of a checkpoint"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(
            f"{what} {name!r}: there is no such directory, and it is no hub id "
            "(owner/name); give one of the two"
        )

    def explain(error: BaseException) -> str:
        return (
            f"{what} {name!r}: there is no such directory, and downloading it from the "
            f"hub failed: {one_line(error)}"
        )

    with library_errors(explain):
        unwanted = _UNWANTED if weights else [*_UNWANTED, _WEIGHTS]
        local = snapshot_download(
            name, allow_patterns=_WANTED, ignore_patterns=unwanted
        )
    return Path(local)


def refuse_dangling_link(path: Path) -> None:
    """InputError for a link to nothing, such as a half-copied cache of the hub has."""
    if path.is_symlink() and not path.exists():
        raise InputError(
            f"{path}: a link to {os.readlink(path)}, which is not there; fetch the "
            "checkpoint again, or copy it with its links followed (cp -rL)"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError where the file is missing or holds something else."""
    if not path.is_file():
        refuse_dangling_link(path)
        raise InputError(f"{path}: missing; a checkpoint directory needs it")
    with library_errors(
        lambda error: f"{path}: not JSON ({one_line(error)}); mend or replace it"
    ):
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a JSON object, got {type(values).__name__}")
    return values


def read_config(directory: Path) -> DecoderConfig:
    """The checked `config.json` of a checkpoint directory."""
    _refuse_other_kinds(directory)
    values = read_json(directory / CONFIG)
    try:
        return parse_hf_config(values)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error


def _refuse_other_kinds(directory: Path) -> None:
    """Directories that look like a language model's to this program, and are none."""
    adapter = directory / ADAPTER_CONFIG
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise InputError(
            f"{directory}: holds a LoRA (PEFT) adapter of {base!r}, not a whole model; "
            "give that model, and this directory as lora.adapter; or merge both first: "
            f"dpo export --merge {directory} NEW_DIR"
        )
    if (directory / "modules.json").is_file():
        raise InputError(
            f"{directory}: holds a sentence-transformers model (modules.json), which "
            "embeds text and predicts no token; give a causal language model"
        )
    if not (directory / CONFIG).is_file():
        _refuse_foreign_weights(directory)


def _matching(directory: Path, patterns: str) -> list[str]:
    return sorted(
        path.name for pattern in patterns.split() for path in directory.glob(pattern)
    )


def _refuse_foreign_weights(directory: Path) -> None:
    if (directory / SINGLE).is_file() or (directory / INDEX).is_file():
        return
    for patterns, meaning in _FOREIGN_WEIGHTS:
        if names := _matching(directory, patterns):
            raise InputError(
                f"{directory}: no {SINGLE} or {INDEX}; {listed(names)} "
                f"{'is' if len(names) == 1 else 'are'} {meaning}"
            )


def listed(names: Iterable[str], most: int = 4) -> str:
    """A few names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def is_tokenizer_file(name: str) -> bool:
    """Whether a name in a checkpoint's directory is one of a tokenizer's files."""
    patterns = (*VOCABULARIES, *_TOKENIZER_SETTINGS)
    return any(fnmatch(name, pattern) for pattern in patterns)


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files, and the index's file of each tensor (none without one).

    Raises:
        InputError: no safetensors, an index that is wrong, or files that it misses.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], {}
    for name in (SINGLE, INDEX):
        refuse_dangling_link(directory / name)
    if not (directory / INDEX).is_file():
        _refuse_foreign_weights(directory)
        raise InputError(
            f"{directory}: no weights; expected {SINGLE}, or {INDEX} and its files"
        )
    path = directory / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map is missing or empty; fetch it again")
    names = sorted(set(map(str, weight_map.values())))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InputError(
            f"{path}: weight_map names {listed(outside)}; only files beside it are read"
        )
    for name in names:
        refuse_dangling_link(directory / name)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of its {len(names)} files are missing: "
            f"{listed(missing)}; fetch them again"
        )
    return [directory / name for name in names], weight_map


def why_unreadable(path: Path, error: BaseException) -> str:
    """The message for a safetensors file that the library does not read."""
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return f"{path}: a Git LFS pointer, not the weights; fetch them: git lfs pull"
    if not start:
        return f"{path}: empty; fetch it again"
    return f"{path}: not a whole safetensors file ({one_line(error)}); fetch it again"
