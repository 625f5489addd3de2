"""Where each value of a run's configuration comes from: file and line, or override."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from engine.config.run import RunConfig
from engine.config.run_file import build, read_run_file
from engine.config.show import plain
from engine.paths import as_path

DEFAULT, COMMAND_LINE = "default", "command line"
_COLUMN = 44  # at which comments begin, where the values are short enough


def resolved(path: str | Path, overrides: list[str]) -> str:
    """The whole configuration as a run file, with a comment of origin for each value.

    Raises:
        InputError: whatever `load_run_config` refuses.
    """
    run_file = read_run_file(path, overrides)
    run = plain(build(RunConfig, run_file))
    written = _key_lines(path)
    actions = run.pop("actions")

    def origin(key: str) -> str:
        parts = key.split(".")
        above = {".".join(parts[: i + 1]) for i in range(len(parts))}
        if above & run_file.overridden:
            return COMMAND_LINE
        line = written.get(key)
        return DEFAULT if line is None else f"{path}:{line}"

    lines = [
        "config:",
        *_lines(run, "", "  ", origin),
        _line("actions", actions, "", origin("actions")),
    ]
    return "\n".join(lines)


def _lines(
    tree: Mapping[str, Any], prefix: str, indent: str, origin: Callable[[str], str]
) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and _is_section(key):
            yield f"{indent}{name}:"
            yield from _lines(value, f"{key}.", f"{indent}  ", origin)
        elif name == "informs":
            yield f"{indent}{name}:"
            for i, entry in enumerate(value):
                first, *rest = _lines(entry, f"{key}.{i}.", f"{indent}    ", origin)
                yield f"{indent}  - {first.lstrip()}"
                yield from rest
        else:
            yield _line(name, value, indent, origin(key))


def _is_section(key: str) -> bool:
    """Whether a mapping has keys of ours, and is no value such as a scheduler's."""
    return not key.startswith("trainer.")


def _line(name: str, value: Any, indent: str, origin: str) -> str:
    text = yaml.safe_dump(
        value, default_flow_style=True, width=float("inf"), sort_keys=False
    )
    text = f"{indent}{name}: {text.removesuffix('...\n').rstrip()}"
    return f"{text:<{_COLUMN}}  # {origin}"


def _key_lines(path: str | Path) -> dict[str, int]:
    """The line of each dotted key of a run file, counted from 1."""
    root = yaml.compose(as_path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
    found: dict[str, int] = {}
    for key, line in _walk(root, ""):
        found.setdefault(key.removeprefix("config."), line)
    return found


def _walk(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.SequenceNode):
        for i, entry in enumerate(node.value):
            yield from _walk(entry, f"{prefix}{i}.")
    if not isinstance(node, yaml.MappingNode):
        return
    merged = []
    for key, value in node.value:
        if key.value == "<<":  # what it brings counts less than what stands here
            several = isinstance(value, yaml.SequenceNode)
            merged += value.value if several else [value]
            continue
        yield f"{prefix}{key.value}", key.start_mark.line + 1
        yield from _walk(value, f"{prefix}{key.value}.")
    for one in merged:
        yield from _walk(one, prefix)
