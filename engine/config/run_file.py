"""YAML run files and command-line overrides, turned into checked dataclasses."""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.config.aliases import other_name
from engine.config.fields import convert, did_you_mean
from engine.config.yaml_text import parse
from engine.errors import InputError, shortened, shown
from engine.paths import as_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFile:
    """What a run file and its overrides say, not yet checked."""

    path: str
    tree: dict[str, Any]  # the keys under `config:`, and `actions`
    overridden: frozenset[str]  # the dotted keys that the command line gave
    # Those above them that the file did not have: `trainer.seed` of trainer.seed.x=1.
    implied: frozenset[str] = frozenset()

    def error(self, message: str, key: str) -> InputError:
        """The error that says who gave the dotted `key`: the file or the override."""
        parts = key.split(".")
        prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
        ours = prefixes & self.overridden or key in self.implied
        return InputError(f"{'command line' if ours else self.path}: {message}")


def read_run_file(path: str | Path, overrides: list[str]) -> RunFile:
    """Reads the file and applies `dotted.key=value` to it.

    Raises:
        InputError: no such file, not YAML, not of the form `config:` and `actions:`,
            or an override that does not parse.
    """
    root = _parse(path)
    if not isinstance(root, dict):
        said = "is empty" if root is None else f"holds a {type(root).__name__}"
        raise InputError(f"{path}: {said}; expected the keys `config:` and `actions:`")
    for key in root:
        if key not in ("config", "actions"):
            raise InputError(
                f"{path}: unknown key {key!r}{other_name(str(key))}; at the top there "
                "are `config:` and `actions:`, and everything else goes under `config:`"
            )
    config = root.get("config")
    if not isinstance(config, dict):
        raise InputError(f"{path}: config must be a mapping with `model:`, `mixture:`")
    if "actions" in config:
        raise InputError(f"{path}: actions stands beside `config:`, not under it")
    tree = dict(config)
    if root.get("actions") is not None:
        tree["actions"] = root["actions"]
    implied: set[str] = set()
    keys = [_override(tree, word, implied) for word in overrides]
    return RunFile(
        path=str(path),
        tree=tree,
        overridden=frozenset(keys),
        implied=frozenset(implied),
    )


def build[Config](cls: type[Config], run_file: RunFile) -> Config:
    """The dataclass `cls`, with the dataclasses inside it, from the file's tree.

    Raises:
        InputError: an unknown key, a missing one, or what a dataclass refuses.
    """
    return _Builder(run_file, known=tuple(dotted_keys(cls))).section(
        cls, run_file.tree, ""
    )


@dataclasses.dataclass(frozen=True)
class _Builder:
    run_file: RunFile
    known: tuple[str, ...]  # every dotted key there is, to point at misplaced ones

    def section(self, cls: type, data: Any, key: str) -> Any:
        """`data`, the mapping at the dotted `key`, as a `cls`."""
        prefix = f"{key}." if key else ""
        hints = typing.get_type_hints(cls)
        if not isinstance(data, dict):
            rule = f"must be a mapping with keys from {', '.join(hints)}"
            raise self.run_file.error(f"{key}={shown(data)} {rule}", key)
        for name in data:
            if name not in hints:
                near = self._nearest(name, hints, prefix)
                message = f"unknown key {_spelt(prefix, name)}{near}"
                raise self.run_file.error(message, f"{prefix}{name}")
        for field in dataclasses.fields(cls):
            required = field.default is field.default_factory is dataclasses.MISSING
            if required and data.get(field.name) is None:
                name = prefix + field.name
                raise self.run_file.error(f"{name} is missing", name)
        values = {
            name: self._value(hints[name], value, f"{prefix}{name}")
            for name, value in data.items()
            # `trainer:` with nothing under it is a section at its defaults.
            if value is not None or not dataclasses.is_dataclass(hints[name])
        }
        try:
            return cls(**values)
        except InputError as error:
            raise self._placed(f"{prefix}{error}") from None

    def _value(self, hint: Any, value: Any, key: str) -> Any:
        nested, is_list = dataclass_in(hint)
        if nested is None or value is None:
            try:
                return convert(value, hint, key)
            except InputError as error:
                raise self._placed(str(error)) from None
        if not is_list:
            return self.section(nested, value, key)
        if not isinstance(value, list):
            message = f"{key}={shown(value)} must be a list of mappings"
            raise self.run_file.error(message, key)
        return tuple(self.section(nested, v, f"{key}.{i}") for i, v in enumerate(value))

    def _placed(self, message: str) -> InputError:
        """`message`, which starts with a dotted key, and who gave that key."""
        return self.run_file.error(message, re.split("[= ]", message)[0])

    def _nearest(self, name: Any, siblings: Mapping[str, Any], prefix: str) -> str:
        for key in self.known:
            if key.split(".")[-1] == name:
                return f"; did you mean {key!r}?"
        if hint := other_name(str(name)):
            return hint
        if f"{prefix}{name}" in self.known:
            parts = [f"`{part}:`" for part in str(name).split(".")]
            return f"; sections are nested in a file: {', then '.join(parts)}"
        near = did_you_mean(str(name), siblings, prefix)
        return near or f"; known: {', '.join(siblings)}"


def _spelt(prefix: str, name: Any) -> str:
    """A dotted key; in quotes where it might be taken for more or less than a key."""
    key = f"{prefix}{name}"
    plain = key.isprintable() and not re.search(r"[\s;:,'\"]", key)
    return shortened(key) if plain and name != "" else shown(key)


def dataclass_in(hint: Any) -> tuple[type | None, bool]:
    """The dataclass that a field holds, and whether it holds a tuple of them."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint), False
    for argument in typing.get_args(hint):
        if dataclasses.is_dataclass(argument):
            return typing.cast(type, argument), typing.get_origin(hint) is tuple
    return None, False


def dotted_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields, those inside lists with index 0."""
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name
        nested, is_list = dataclass_in(hint)
        if nested is not None:
            yield from dotted_keys(nested, f"{prefix}{name}.{'0.' if is_list else ''}")


def _parse(path: str | Path) -> Any:
    try:
        text = as_path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; give a YAML file") from None
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        said = error.strerror if isinstance(error, OSError) else str(error)
        said = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else said
        raise InputError(f"{path}: cannot be read ({said}); give a YAML file") from None
    try:
        return parse(text)
    except InputError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None


def _override(tree: dict[str, Any], word: str, implied: set[str]) -> str:
    """Applies one `dotted.key=value` to the tree in place; returns the key.

    Keys above it that had to be made for it are added to `implied`.
    """
    key, equals, text = word.partition("=")
    key = key.removeprefix("config.")
    parts = key.split(".")
    if not equals or "" in parts:
        raise InputError(
            f"command line: {word!r} is not an override; write dotted.key=value, "
            "such as trainer.beta=0.2"
        )
    try:
        value = parse(text)
    except InputError as error:
        raise InputError(
            f"command line: {key}: {shown(text)} is not a YAML value ({error}); put it "
            "in quotes"
        ) from None
    parent: Any = tree
    for depth, part in enumerate(parts[:-1]):
        place = _place(parent, part, parts[:depth], key)
        if parent[place] is None:
            parent[place] = {}
            implied.add(".".join(parts[: depth + 1]))
        parent = parent[place]
    parent[_place(parent, parts[-1], parts[:-1], key)] = value
    return key


def _place(parent: Any, part: str, above: list[str], key: str) -> Any:
    """`part` as a key or index of `parent`, where a missing key is made."""
    if isinstance(parent, dict):
        parent.setdefault(part, None)
        return part
    said = f"command line: {key}: {'.'.join(above)}"
    if not isinstance(parent, list):
        raise InputError(f"{said} is {shown(parent)}, which has no keys")
    # (By the text first: int() takes no more than 4300 digits.)
    if not part.isdecimal() or len(part) > 9 or int(part) >= len(parent):
        raise InputError(
            f"{said} is a list of {len(parent)}, so {part!r} must be a smaller number"
        )
    return int(part)
