"""Tokenizers: loaded without running anything of theirs, written as they came."""

import importlib.util
import json
import logging
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import tokenizers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from engine.errors import InputError, library_errors, one_line, shown
from engine.models.checkpoint import (
    CONFIG,
    MORE_TEMPLATES,
    VOCABULARIES,
    is_tokenizer_file,
    listed,
    read_json,
    resolve_directory,
)

logger = logging.getLogger(__name__)

TOKENIZER_JSON = "tokenizer.json"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # else SentencePiece
_PROBES = ("Two words", " space before", "a\n\nb  c", "it's 12345", "é 漢 😀")
_WAY_OUT = "or name another tokenizer with model.tokenizer"
_SETTINGS, _ADDED = "tokenizer_config.json", "added_tokens.json"
_JSON_FILES = (_SETTINGS, _ADDED, "special_tokens_map.json")


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id; none of its own code is run.

    Raises:
        InputError: none is there, or it cannot be read: which file, what it needs.
    """
    directory = resolve_directory(name_or_path, "tokenizer")
    tokenizer = _from_directory(directory)
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise InputError(
            f"{directory / _SETTINGS}: model_max_length={shown(longest)} must be a "
            "number or null"
        )
    path = directory / TOKENIZER_JSON
    if path.is_file() and hasattr(tokenizer, "backend_tokenizer"):
        with library_errors(
            lambda error: f"{path}: cannot be read ({one_line(error)})"
        ):
            by_file = tokenizers.Tokenizer.from_file(str(path))
        _warn_of_new_tokens(tokenizer, by_file, directory)
        _warn_of_other_tokens(tokenizer, by_file, path)
    return tokenizer


def _warn_of_new_tokens(tokenizer: Any, by_file: Any, directory: Path) -> None:
    """Tells of special tokens that no file lists, which transformers then adds."""
    known = set(by_file.get_vocab(with_added_tokens=True))
    for name, key in ((_SETTINGS, "added_tokens_decoder"), (_ADDED, None)):
        path = directory / name
        values = read_json(path) if path.is_file() else {}
        if key is None:
            known |= values.keys()
        else:
            known |= {str(token["content"]) for token in values.get(key, {}).values()}
    new = {
        f"{option}={token!r}": tokenizer.convert_tokens_to_ids(token)
        for option, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str) and token not in known
    }
    if new:
        logger.warning(
            "%s: not in the vocabulary: %s; each gets a new id, which the model has "
            "never seen: correct them in %s",
            directory,
            listed(f"{name} (id {index})" for name, index in new.items()),
            _SETTINGS,
        )


def _warn_of_other_tokens(tokenizer: Any, by_file: Any, path: Path) -> None:
    """Tells of a class of transformers that overrules what tokenizer.json says.

    Some of its classes set spaces and splitting up on their own. Training then sees
    other tokens than programs that go by the file, or by another version.
    """
    by_file.no_truncation()
    by_file.no_padding()
    for text in _PROBES:
        # (verbose=False: not a word on texts above model_max_length.)
        ours = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        others = by_file.encode(text, add_special_tokens=False).ids
        if ours != others:
            logger.warning(
                "%s: its tokens of %r are %s, those of transformers' %s are %s, and "
                "these are trained on; to go by the file, set tokenizer_class to "
                "TokenizersBackend in tokenizer_config.json",
                path,
                text,
                others,
                type(tokenizer).__name__,
                ours,
            )
            return


def _from_directory(directory: Path) -> PreTrainedTokenizerBase:
    names = [path.name for path in directory.iterdir()]
    if not any(fnmatch(name, kind) for name in names for kind in VOCABULARIES):
        raise InputError(
            f"{directory}: there is no tokenizer; it needs tokenizer.json (or "
            "tokenizer.model, or vocab.json and merges.txt); put the model's there, "
            f"{_WAY_OUT}"
        )
    if TOKENIZER_JSON not in names:
        _refuse_missing_package(directory)
    for name in _JSON_FILES:
        if name in names:
            read_json(directory / name)
    with library_errors(lambda error: _why_unreadable(directory, error)):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def _refuse_missing_package(directory: Path) -> None:
    """Vocabularies that transformers reads with a package that need not be there."""
    for pattern, package in (
        ("*.model", "sentencepiece"),
        ("*.tiktoken", "tiktoken"),
        ("tekken.json", "mistral-common"),
    ):
        for path in sorted(directory.glob(pattern)):
            if package == "sentencepiece" and _TIKTOKEN_LINE.match(path.read_bytes()):
                package = "tiktoken"
            if importlib.util.find_spec(package.replace("-", "_")) is None:
                raise InputError(
                    f"{path}: needs the package {package} to be read: pip install "
                    f"{package}; or put a {TOKENIZER_JSON} beside it, {_WAY_OUT}"
                )


def _why_unreadable(directory: Path, error: BaseException) -> str:
    """The message for a tokenizer that transformers does not load."""
    settings = directory / _SETTINGS
    if settings.is_file() and "auto_map" in read_json(settings):
        return (
            f"{settings}: auto_map names code that comes with the tokenizer, which is "
            f"never run; use a {TOKENIZER_JSON}, {_WAY_OUT}"
        )
    for path in sorted(directory.iterdir()):
        if path.name == TOKENIZER_JSON:
            if fault := _fault_of_tokenizer_json(path):
                return f"{fault}, {_WAY_OUT}"
        elif path.suffix == ".json" and is_tokenizer_file(path.name):
            read_json(path)
        elif path.suffix in (".jinja", ".txt"):
            with library_errors(
                lambda error, path=path: f"{path}: not UTF-8 text ({one_line(error)})"
            ):
                path.read_text(encoding="utf-8")
    if (directory / "vocab.json").is_file() and not list(directory.glob("merges*")):
        return f"{directory}: vocab.json needs a merges.txt beside it, {_WAY_OUT}"
    if _fault_of_config(directory) == one_line(error):
        return (
            f"{directory / CONFIG}: transformers cannot read it ({one_line(error)}); "
            f"mend it, {_WAY_OUT}"
        )
    return (
        f"{directory}: the tokenizer cannot be loaded ({one_line(error)}); fetch its "
        f"files again, {_WAY_OUT}"
    )


def _fault_of_config(directory: Path) -> str | None:
    """What transformers, which reads it for a tokenizer too, says of config.json."""
    if not (directory / CONFIG).is_file():
        return None
    try:
        with library_errors(one_line):
            AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except InputError as error:
        return str(error)
    return None


def _fault_of_tokenizer_json(path: Path) -> str | None:
    """What is wrong with the file as such, and what to do; None: it can be read."""
    read_json(path)
    try:
        with library_errors(one_line):
            tokenizers.Tokenizer.from_file(str(path))
    except InputError as error:
        return (
            f"{path}: tokenizers {tokenizers.__version__} cannot read it ({error}); it "
            "is of a newer version or damaged: pip install -U tokenizers transformers, "
            "fetch it again"
        )
    return None


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes a tokenizer's files, byte for byte those that it was loaded from.

    transformers writes a tokenizer that was made in Python or changed since. (What it
    writes of a loaded one need not tokenize alike, and older versions may not load it.)

    Args:
        directory: has the model's config.json, which decides how files are understood.
    """
    copies = _copy_source(tokenizer, directory)
    if copies:
        differences = _differences(tokenizer, directory)
        if not differences:
            return
        logger.warning(
            "the tokenizer is not what its files in %s give beside this model (other: "
            "%s), so that transformers writes them anew",
            tokenizer.name_or_path,
            listed(differences),
        )
        for path in copies:
            path.unlink()
    with library_errors(
        lambda error: f"the tokenizer could not be written ({one_line(error)})"
    ):
        tokenizer.save_pretrained(directory)


def _copy_source(tokenizer: PreTrainedTokenizerBase, directory: Path) -> list[Path]:
    """Copies of the files that a tokenizer was loaded from; none: made in Python."""
    source = _source(tokenizer)
    if source is None:
        return []
    copies = []
    own = frozenset(tokenizer.vocab_files_names.values())
    for path in (*source.iterdir(), *source.glob(f"{MORE_TEMPLATES}/*")):
        name = path.relative_to(source).as_posix()
        if path.is_file() and (name in own or is_tokenizer_file(name)):
            (directory / name).parent.mkdir(exist_ok=True)
            copies.append(Path(shutil.copyfile(path, directory / name)))
    return copies


def _source(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The directory that a tokenizer was loaded from; None: it was made in Python."""
    name = tokenizer.name_or_path
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        with library_errors(one_line):
            return Path(snapshot_download(name, local_files_only=True))
    except InputError:
        return None


def _differences(tokenizer: PreTrainedTokenizerBase, directory: Path) -> list[str]:
    """In what a tokenizer differs from what the files in a directory give."""
    try:
        reloaded = _from_directory(directory)
    except InputError as error:
        return [str(error)]
    ours, theirs = _traits(tokenizer), _traits(reloaded)
    return [name for name in ours if ours[name] != theirs.get(name)]


def _traits(tokenizer: Any) -> dict[str, Any]:
    """Whatever decides which tokens a text or a conversation becomes, and back."""
    traits = {
        "vocabulary": tokenizer.get_vocab(),
        "added tokens": tokenizer.added_tokens_decoder,
        "special tokens": tokenizer.special_tokens_map,
        "chat template": tokenizer.chat_template,
    }
    for option in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"):
        traits[option] = getattr(tokenizer, option, None)
    if hasattr(tokenizer, "backend_tokenizer"):
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are what the last call asked for.
        traits |= {
            f"tokenizer.json's {key}": value
            for key, value in pipeline.items()
            if key not in ("padding", "truncation", "model")
        }
        traits["model"] = {
            key: value for key, value in pipeline["model"].items() if key != "dropout"
        }
    return traits
