"""What cannot be with a data set that is streamed."""

import dataclasses

from engine.config.dpo import DPOConfig
from engine.errors import InputError

BUFFER = 1000  # pairs among which a stream is shuffled unless something else is said

# Options of `DPOConfig` that need the whole data set first, and why.
_NEED_ALL = {
    "num_train_epochs": (
        "has no effect on a data set that is streamed, which starts over until "
        "max_training_steps are done"
    ),
    "precompute_ref_log_probs": (
        "cannot be with a data set that is streamed, as nothing of it is kept"
    ),
}


def check_streaming(
    trainer: DPOConfig, shuffle_buffer_size: int | None, section: str = ""
) -> None:
    """Refuse options that a training set which is streamed makes impossible.

    Args:
        shuffle_buffer_size: as it was given; None: it was not.
        section: what stands before the names of the trainer's options.
    Raises:
        InputError: naming the option.
    """
    if trainer.max_training_steps is None:
        raise InputError(
            f"{section}max_training_steps is missing: how long a data set is that is "
            "streamed is not known before its end, and learning rates follow from the "
            "number of steps; give the number of optimizer steps"
        )
    for field in dataclasses.fields(trainer):
        value = getattr(trainer, field.name)
        if field.name in _NEED_ALL and value != field.default:
            reason = _NEED_ALL[field.name]
            raise InputError(f"{section}{field.name}={value!r} {reason}; remove it")
    size = shuffle_buffer_size
    if not trainer.shuffle_train_dataset and size is not None and size > 1:
        raise InputError(
            f"shuffle_buffer_size={size} has no effect with {section}"
            "shuffle_train_dataset=False; remove one"
        )
