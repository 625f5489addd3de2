"""Options of the loss that mean nothing, alone or together, are refused by name."""

import pytest

from engine.config.dpo import DPOConfig
from engine.config.run import (
    MixtureConfig,
    ModelConfig,
    ReferenceConfig,
    RunConfig,
    SourceConfig,
)
from engine.errors import InputError
from engine.objective.losses import LOSSES


@pytest.mark.parametrize(
    "options, named",
    [
        ({"loss_type": "kto"}, "loss_type='kto' must be one of sigmoid, hinge"),
        ({"loss_type": []}, "at least one loss"),
        ({"loss_type": ["sigmoid", "hinges"]}, "did you mean 'hinge'"),
        ({"loss_type": ["aot_pair", "aot_unpaired"]}, "names a loss twice"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights has 2 entries"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0]}, "greater than 0"),
        ({"rpo_alpha": 0.0}, "rpo_alpha=0.0 must be greater than 0"),
        ({"loss_type": ["sigmoid", "sft"], "rpo_alpha": 1.0}, "rpo_alpha=1.0 adds"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "with loss_type 'hinge'"),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect"),
        ({"loss_type": "discopop", "discopop_tau": 2.0}, "at most 1"),
        ({"loss_type": "simpo", "simpo_gamma": -1.0}, "at least 0"),
        ({"bco_shift": "batch_mean"}, "bco_shift='batch_mean' has no effect"),
        ({"loss_type": ["exo_pair", "robust"]}, "shared with robust"),
        ({"loss_type": ["simpo", "ipo"]}, "is of the policy alone and 'ipo'"),
        ({"loss_type": "cpo", "rpo_alpha": 1.0}, "a whole objective"),
        ({"loss_type": "orpo", "sync_ref_model": True}, "with loss_type='orpo'"),
        ({"f_divergence_type": "kl"}, "f_divergence_type='kl' must be one of"),
        ({"f_alpha_divergence_coef": 0.3}, "with f_divergence_type 'reverse_kl'"),
        (
            {"loss_type": "nca_pair", "f_divergence_type": "js_divergence"},
            "has no meaning with loss_type 'nca_pair'",
        ),
        (
            {"loss_type": "sft", "f_divergence_type": "js_divergence"},
            "has no meaning with loss_type 'sft'",
        ),
        ({"ld_alpha": 1.5}, "within 0 and 1"),
        ({"loss_type": "simpo", "ld_alpha": 0.5}, "with loss_type 'simpo'"),
        ({"loss_type": "aot", "use_weighting": True}, "the loss of 'aot'"),
        ({"rpo_alpha": 1.0, "use_weighting": True}, "the loss of rpo_alpha"),
    ],
)
def test_what_means_nothing_is_refused(options, named):
    with pytest.raises(InputError) as caught:
        DPOConfig(**options)
    assert named in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*LOSSES, "aot_pair"])
def test_every_name_makes_a_loss(name):
    config = DPOConfig(loss_type=name)
    (found,) = config.losses
    assert found == ("aot_unpaired" if name == "aot_pair" else name)
    assert config.loss.whole_batch == LOSSES[found].whole_batch


def test_combinations_that_mean_something():
    mpo = DPOConfig(loss_type=("sigmoid", "bco_pair"), rpo_alpha=0.5)
    assert mpo.losses == {"sigmoid": 1.0, "bco_pair": 1.0, "sft": 0.5}
    assert DPOConfig(loss_type="simpo", rpo_alpha=0.1).without_reference
    shifted = DPOConfig(loss_type="bco_pair", bco_shift="batch_mean")
    assert shifted.loss.whole_batch
    assert DPOConfig(loss_type="exo_pair").smoothing == 1e-3
    assert DPOConfig(loss_type="exo_pair", label_smoothing=0.1).smoothing == 0.1
    divergence = DPOConfig(
        loss_type=("ipo", "sft"), f_divergence_type="alpha_divergence"
    )
    assert divergence.loss.reference
    assert DPOConfig(use_weighting=True).loss.stats == ("collision",)


def test_a_reference_model_that_nothing_reads_is_refused():
    for trainer in (DPOConfig(loss_type="simpo"), DPOConfig(reference_free=True)):
        with pytest.raises(InputError, match="reference_model has no effect"):
            RunConfig(
                model=ModelConfig(name_or_path="model"),
                mixture=MixtureConfig(informs=(SourceConfig(data_files="x.jsonl"),)),
                reference_model=ReferenceConfig(name_or_path="other"),
                trainer=trainer,
            )
