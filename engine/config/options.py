"""`docs/config.md`: every option with its type, default and meaning, from the code.

`python -m engine.config.options > docs/config.md` writes it anew. A meaning is the
comment behind a field, or the one above it where there is none behind; else a comment
above is about the fields that follow.
"""

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import yaml

from engine.config.columns import ColumnsConfig
from engine.config.dpo import DPOConfig
from engine.config.lora import LoraConfig
from engine.config.optimizer import ScheduleOptions
from engine.config.run import (
    MixtureConfig,
    ModelConfig,
    ReferenceConfig,
    RunConfig,
    ShardingConfig,
    SourceConfig,
)
from engine.config.show import plain

_WORDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true, false",
    dict: "mapping",
    type(None): "null",
}
# In the order of the page: the heading, and the class whose fields stand there.
_SECTIONS: dict[str, type] = {
    "At the top": RunConfig,
    "model": ModelConfig,
    "lora": LoraConfig,
    "reference_model": ReferenceConfig,
    "mixture and eval_mixture": MixtureConfig,
    "informs, each entry": SourceConfig,
    "columns of an entry": ColumnsConfig,
    "sharding": ShardingConfig,
    "trainer": DPOConfig,
    **{
        f"trainer: {base.__name__.removesuffix('Config').lower()}": base
        for base in DPOConfig.__mro__[1:]
        if dataclasses.is_dataclass(base)
    },
    "trainer: lr_scheduler_kwargs": ScheduleOptions,
}
_INTRODUCTION = """\
# Every option

Made from the code by `python -m engine.config.options > docs/config.md`; a test holds
that it is current. In a run file these stand under `config:`, but for `actions`, which
stands beside it; on the command line they are `section.option=value`. `DPOConfig(...)`
and `LoraConfig(...)` take the same names. `dpo show run.yaml` prints a run's values.
"""


class Option(NamedTuple):
    """A field of a dataclass, as its source has it."""

    name: str
    values: str
    default: str | None  # None: it must be given
    meaning: str
    heading: str  # a remark about this field and those behind it


def options(cls: type) -> Iterator[Option]:
    """The fields that a dataclass declares itself."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    source = inspect.getsource(cls)
    lines = source.splitlines()
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        assert node.end_lineno is not None and node.end_col_offset is not None
        behind = lines[node.end_lineno - 1][node.end_col_offset :].strip()
        above = _comment_above(lines, node.lineno - 1)
        meaning = behind.removeprefix("#").strip()
        yield Option(
            name=node.target.id,
            values=_words(hints[node.target.id]),
            default=_default(fields[node.target.id]),
            meaning=_yaml_words(meaning or above),
            heading=_yaml_words(above) if meaning else "",
        )


def _comment_above(lines: list[str], index: int) -> str:
    found: list[str] = []
    while index > 0 and lines[index - 1].strip().startswith("#"):
        index -= 1
        found.insert(0, lines[index].strip().removeprefix("#").strip())
    return " ".join(found)


def _yaml_words(text: str) -> str:
    """Python's words for values as YAML has them."""
    for word in ("None", "True", "False"):
        known = "null" if word == "None" else word.lower()
        text = re.sub(rf"\b{word}\b", known, text)
    return text


def _default(field: dataclasses.Field) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        return "its own"
    if field.default is dataclasses.MISSING:
        return None
    text = yaml.safe_dump(plain(field.default), default_flow_style=True)
    return f"`{text.removesuffix('...\n').strip()}`"


def _words(hint: Any) -> str:
    """A type in the words of a run file."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{name}`" for name in inner)
    if origin is tuple:
        entries = "sections" if dataclasses.is_dataclass(inner[0]) else _words(inner[0])
        return f"a list of {entries}"
    if origin in (typing.Union, types.UnionType):
        return ", ".join(map(_words, inner))
    if dataclasses.is_dataclass(hint):
        return "a section"
    return _WORDS[origin or hint]


def page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([_INTRODUCTION, *_sections()])


def _sections() -> Iterator[str]:
    for heading, cls in _SECTIONS.items():
        yield f"## {heading}\n"
        yield from _rows(cls)
        yield ""


def _rows(cls: type) -> Iterator[str]:
    yield f"{_yaml_words(' '.join(_first_paragraph(cls)))}\n"
    head = ["| option | values | default | meaning |", "|---|---|---|---|"]
    yield from head
    for option in options(cls):
        if option.heading:
            yield f"| | | | *{_cell(option.heading)}* |"
        default = option.default or "required"
        cells = f"`{option.name}`", option.values, default, option.meaning
        yield f"| {' | '.join(map(_cell, cells))} |"


def _first_paragraph(cls: type) -> list[str]:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].splitlines()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
