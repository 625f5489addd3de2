"""By what evaluations are compared, which of them is the best, and what is refused."""

from typing import Any

import numpy as np
import pytest

from engine import DPOConfig
from engine.errors import InputError
from engine.training.best import Best, BestModel, best_model
from engine.training.metrics import metric_names
from engine.training.prepare import loss_options


def hear(values: list[float], **options: Any) -> tuple[list[int], Best]:
    """How long each evaluation has been waited for a better one, and the best."""
    how = BestModel(metric="m", **options)
    best, waited = Best(), []
    for step, value in enumerate(values, start=1):
        how.hear(best, step, {"m": value})
        waited.append(best.waited)
    return waited, best


@pytest.mark.parametrize(
    ("values", "options", "waited", "best"),
    [
        ([3, 2, 2, 4, 1], {"greater": False}, [0, 0, 1, 2, 0], (5, 1)),
        ([3, 2, 2, 4, 1], {"greater": True}, [0, 1, 2, 0, 1], (4, 4)),
        # As in transformers: better than the best one, which small steps move too.
        ([5, 4.6, 4.2, 3], {"greater": False, "threshold": 0.5}, [0, 1, 2, 0], (4, 3)),
        ([np.nan, 2, np.nan, 1], {"greater": False}, [1, 0, 1, 0], (4, 1)),
        ([np.nan, np.nan], {"greater": True}, [1, 2], (0, 0)),
    ],
)
def test_what_is_better(values, options, waited, best):
    found, state = hear(values, **options)
    assert found == waited
    assert (state.step, state.value) == best


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, "the greatest m"),
        ({"patience": 3}, "the greatest m; stops after 3 not better"),
        (
            {"patience": 3, "threshold": 0.5},
            "the greatest m; stops after 3 not better by 0.5",
        ),
    ],
)
def test_the_rule_in_words(options, rule):
    assert BestModel(metric="m", greater=True, **options).rule() == rule


def test_it_is_over_after_so_many():
    how = BestModel(metric="m", greater=True, patience=2)
    assert [how.is_over(Best(waited=n)) for n in range(4)] == [False, False, True, True]
    assert not BestModel(metric="m", greater=True).is_over(Best(waited=99))


ONE, TWO = ("eval_",), ("eval_near_", "eval_far_")


def choose(prefixes: tuple[str, ...] = ONE, **options: Any) -> BestModel | None:
    config = DPOConfig(eval_steps=1, **options)
    names = metric_names(config.loss, loss_options(config))
    return best_model(config, prefixes, names)


@pytest.mark.parametrize(
    ("prefixes", "options", "metric", "greater"),
    [
        (ONE, {"load_best_model_at_end": True}, "eval_loss", False),
        (ONE, {"early_stopping_patience": 1}, "eval_loss", False),
        (ONE, {"metric_for_best_model": "eval_loss"}, "eval_loss", False),
        (
            ONE,
            {"metric_for_best_model": "rewards/accuracies"},
            "eval_rewards/accuracies",
            True,
        ),
        (
            ONE,
            {"metric_for_best_model": "loss", "greater_is_better": True},
            "eval_loss",
            True,
        ),
        (
            ONE,
            {"metric_for_best_model": "entropy", "greater_is_better": False},
            "eval_entropy",
            False,
        ),
        (
            ONE,
            {
                "metric_for_best_model": "loss/ipo",
                "loss_type": ["sigmoid", "ipo"],
            },
            "eval_loss/ipo",
            False,
        ),
        (TWO, {"metric_for_best_model": "eval_far_loss"}, "eval_far_loss", False),
        (TWO, {"metric_for_best_model": "near_loss"}, "eval_near_loss", False),
        (("eval_held_",), {"metric_for_best_model": "loss"}, "eval_held_loss", False),
    ],
)
def test_which_metric(prefixes, options, metric, greater):
    found = choose(prefixes, **options)
    assert found is not None
    assert (found.metric, found.greater) == (metric, greater)


@pytest.mark.parametrize(
    ("prefixes", "options", "said"),
    [
        (
            ONE,
            {"metric_for_best_model": "rewards/accuracy"},
            "no such metric; did you mean 'rewards/accuracies'?",
        ),
        (
            ONE,
            {"metric_for_best_model": "zzz"},
            "such metric; known: loss, rewards/",
        ),
        (ONE, {"metric_for_best_model": "loss/ipo"}, "have no such metric"),
        (ONE, {"metric_for_best_model": "entropy"}, "say so with greater_is_better"),
        (
            TWO,
            {"load_best_model_at_end": True},
            "load_best_model_at_end=True: there are 2 evaluation sets; say with "
            "metric_for_best_model of which: eval_near_loss or eval_far_loss",
        ),
        (
            TWO,
            {"metric_for_best_model": "eval_rewards/margins"},
            "of which: eval_near_rewards/margins or eval_far_rewards/margins",
        ),
    ],
)
def test_a_metric_that_is_refused(prefixes, options, said):
    with pytest.raises(InputError) as error:
        choose(prefixes, **options)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"early_stopping_patience": 2}, "patience=2 compares the evaluations .* give"),
        ({"load_best_model_at_end": True}, "without eval_steps there is one, at the"),
        ({"metric_for_best_model": "loss"}, "'loss' compares .* eval_steps"),
        ({"metric_for_best_model": ""}, "metric_for_best_model='' must not be empty"),
        ({"early_stopping_patience": 0}, "early_stopping_patience=0 must be greater"),
        ({"early_stopping_threshold": 0.1}, "no effect without early_stopping_patienc"),
        (
            {
                "eval_steps": 1,
                "early_stopping_patience": 1,
                "early_stopping_threshold": -1,
            },
            "early_stopping_threshold=-1.0 must be at least 0",
        ),
        (
            {
                "eval_steps": 1,
                "load_best_model_at_end": True,
                "greater_is_better": True,
            },
            "greater_is_better=True has no effect without metric_for_best_model",
        ),
    ],
)
def test_options_without_sense(options, said):
    with pytest.raises(InputError, match=said):
        DPOConfig(**options)
