"""What cannot be with a mixture that is streamed is refused by name."""

import pytest

from engine.config.run import load_run_config
from engine.errors import InputError

RUN = """\
config:
  model: {name_or_path: m}
  mixture: {informs: [{data_files: pairs.jsonl}]}
"""


@pytest.fixture
def load(tmp_path):
    def load(*overrides):
        (tmp_path / "run.yaml").write_text(RUN)
        return load_run_config(tmp_path / "run.yaml", list(overrides))

    return load


STREAMED = ("mixture.streaming=true", "trainer.max_training_steps=5")


def test_a_streamed_mixture(load):
    run = load(*STREAMED, "mixture.shuffle_buffer_size=0")
    assert run.mixture.streaming and run.mixture.shuffle_buffer_size == 0


@pytest.mark.parametrize(
    "overrides, message",
    [
        (STREAMED[:1], "trainer.max_training_steps is missing: how long a data set"),
        (
            (*STREAMED, "trainer.num_train_epochs=2"),
            "trainer.num_train_epochs=2 has",
        ),
        (
            (
                *STREAMED,
                "eval_mixture={streaming: true, informs: [{data_files: e.csv}]}",
            ),
            "eval_mixture.streaming=True cannot be: each evaluation goes over",
        ),
        (
            (
                *STREAMED,
                "mixture.shuffle_buffer_size=10",
                "trainer.shuffle_train_dataset=false",
            ),
            "shuffle_buffer_size=10 has no effect with trainer.shuffle_train_dataset=",
        ),
        (
            ("mixture.shuffle_buffer_size=10",),
            "shuffle_buffer_size=10 has no effect without streaming",
        ),
        (
            (*STREAMED, "mixture.shuffle_buffer_size=-1"),
            "shuffle_buffer_size=-1 must be at least 0",
        ),
    ],
)
def test_what_cannot_be_with_streaming(load, overrides, message):
    with pytest.raises(InputError) as caught:
        load(*overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)
