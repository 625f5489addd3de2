"""YAML as run files and overrides have it: plain data, with fewer surprises."""

import re
from typing import Any

import yaml

from engine.errors import InputError, library_errors, one_line

_MOST_NODES = 100_000  # of what aliases stand for: repeated ones may multiply
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """SafeLoader with numbers that are decimal, and a place for each complaint.

    What YAML 1.1 reads as octal (010 is 8) or to the base of 60 (1:30 is 90) is a
    string.
    """

    at: yaml.Mark | None = None  # of what is being made into a value

    def construct_object(self, node, deep=False):
        self.at = node.start_mark
        return super().construct_object(node, deep)


# By the first character of a plain word: its tag and what it must look like.
_NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in _NUMBERS)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in _TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in zip(_TAGS, _NUMBERS.values(), strict=True):
    _Loader.add_implicit_resolver(
        _tag, re.compile(rf"(?:{_form})$"), list("-+.0123456789")
    )


def parse(text: str) -> Any:
    """The one document in a text; None: there is none.

    Raises:
        InputError: YAML's complaint and the place of it; a key that is given twice in
            one mapping; aliases that stand for themselves, or for too much.
    """
    loader = None

    def explain(error: BaseException) -> str:
        if isinstance(error, RecursionError):
            return "nested too deeply"
        if not isinstance(error, yaml.YAMLError):  # a value that is none of its tag
            return one_line(error) + _place(loader.at if loader else None)
        if not isinstance(error, yaml.MarkedYAMLError):
            return one_line(error)
        problem = error.problem
        if problem == "but found another document":
            problem = "a second document begins (---), and a run has one"
        return f"{problem}{_place(error.problem_mark)}"

    with library_errors(explain):
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node)
        return loader.construct_document(node)


def _place(mark: yaml.Mark | None) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _check(root: yaml.Node) -> None:
    """Refuse what PyYAML makes something of that nobody means.

    Raises:
        InputError: with the place.
    """
    sizes: dict[yaml.Node, int | None] = {}  # None: within itself

    def size(node: yaml.Node) -> int:
        if node in sizes:
            found = sizes[node]
            if found is None:
                raise InputError(f"an alias within itself{_place(node.start_mark)}")
            return found
        sizes[node] = None
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            inner = [one for pair in node.value for one in pair]
        total = 1 + sum(map(size, inner))
        if total > _MOST_NODES:
            place = _place(node.start_mark)
            raise InputError(f"its aliases stand for over {_MOST_NODES} values{place}")
        sizes[node] = total
        return total

    size(root)


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            if key.value in seen:
                place = _place(key.start_mark)
                raise InputError(f"the key {key.value!r} is given twice{place}")
            seen.add(key.value)
