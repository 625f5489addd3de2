"""How much and with what the fuzz tests try, and what every input may end in.

`DPO_FUZZ_EXAMPLES=5000 pytest tests/engine -k fuzz` tries more than `make test` does.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, configuration, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from engine.errors import InputError

ROOT = Path(__file__).parents[2]
configuration.set_hypothesis_home_dir(ROOT / ".pytest_cache" / "hypothesis")
# Hypothesis tries constants of modules that are imported: what it tries would depend on
# which tests ran before.
providers.is_local_module_file = lambda path: False  # pyright: ignore

_MORE = int(os.environ.get("DPO_FUZZ_EXAMPLES", "0"))


def examples(count: int) -> settings:
    """Seeded settings that try so many inputs, unless more are asked for."""
    return settings(
        max_examples=_MORE or count,
        derandomize=not _MORE,
        deadline=None,
        database=None,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
            HealthCheck.function_scoped_fixture,
        ],
    )


def one_line_or_success[T](work: Callable[..., T], *args: Any) -> T | str:
    """What `work` returns, or the one line that it refuses its input with."""
    try:
        return work(*args)
    except InputError as error:
        said = str(error)
        assert said and "\n" not in said and "\r" not in said
        assert len(said) < 3000
        return said


TEXT = st.text(max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "\0",
        "\ud83d",
        "\ufeff",
        "\u2028",
        "é漢😀",
        "a\nb",
        "\r\n",
        "{{ x }}",
        "%s",
    ]
)
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**400]),
    st.floats(),
    st.sampled_from([1e308, 5e-324, float("nan"), float("inf"), -0.0]),
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn, tree: Any, values: st.SearchStrategy = JSON) -> Any:
    """A tree of dicts and lists in which one thing, or a few, are others."""
    for _ in range(draw(st.integers(1, 3))):
        tree = draw(_once(tree, values))
    return tree


@st.composite
def _once(draw: st.DrawFn, tree: Any, values: st.SearchStrategy) -> Any:
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 9)) == 0:
        return draw(values)
    places = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    place = draw(st.sampled_from(places))
    changed = tree.copy()
    kind = draw(st.sampled_from(["inside", "inside", "inside", "remove", "rename"]))
    if kind == "remove":
        del changed[place]
    elif kind == "rename" and isinstance(changed, dict):
        changed[draw(TEXT)] = changed.pop(place)
    elif kind == "rename":
        changed = [*changed, draw(values)]
    else:
        changed[place] = draw(_once(tree[place], values))
    return changed
