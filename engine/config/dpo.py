"""Every option of DPO training: the `trainer:` section of a run file."""

import importlib.util
from dataclasses import dataclass
from typing import Literal

from dpo_kernels.op.backends import BACKENDS
from engine.config.checkpoint import CheckpointConfig
from engine.config.evaluation import EvaluationConfig
from engine.config.fields import (
    check_choice,
    check_count,
    check_float32,
    check_positive,
    check_types,
    check_unused,
    check_within,
    refuses_unknown,
)
from engine.config.loss import LossConfig
from engine.config.optimizer import OptimizerConfig
from engine.errors import InputError
from engine.parallel.batch import Arrangement
from engine.paths import expand

_MOST_PAIRS = 2**20  # of a batch, which is laid out in the host's memory
_WORKSPACE_LIMIT = 2**40  # bytes: more than any device has


@refuses_unknown
@dataclass(frozen=True, kw_only=True)
class DPOConfig(EvaluationConfig, CheckpointConfig, OptimizerConfig, LossConfig):
    """Options of `DPOTrainer`; the bases have those of the groups below.

    They are named as in EasyDeL's run files, which this program reads, and as in TRL
    where EasyDeL has no such option.

    An option that the others make meaningless is refused, unless it is at its default.

    Raises:
        InputError: a value of the wrong type, out of range, or without effect.
    """

    trainer_type: Literal["dpo"] = "dpo"  # for run files of EasyDeL's, which name it
    model_name: str = "DPOTrainer"  # the run's name, in logs
    # metrics.jsonl, checkpoints and the trained model
    save_directory: str = "dpo_checkpoints"
    # Of the trained weights on disk; None: as they were in the model's files.
    save_dtype: Literal["bfloat16", "float16", "float32"] | None = None

    # Reference.
    reference_free: bool = False  # count the reference's log-probabilities as 0
    # Score every pair once, before the first step, keep that on disk ($DPO_CACHE), and
    # free the reference.
    precompute_ref_log_probs: bool = False
    sync_ref_model: bool = False  # let the reference follow the policy
    ref_model_sync_steps: int = 64  # optimizer steps between two updates of it
    ref_model_mixup_alpha: float = 0.9  # ref <- alpha * policy + (1 - alpha) * ref
    # The reference stays in the host's memory; each layer visits the devices.
    offload_ref_model: bool = False

    # Lengths, in tokens. None sets no limit of its own.
    max_length: int = 512  # of prompt and completion together
    max_prompt_length: int | None = None  # keeps the prompt's end
    max_completion_length: int | None = None  # keeps the completion's start
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"  # by max_length

    # Which tokens of a completion are scored: all of them, the assistant's turns, or
    # its last turn. Of a message whose loss_weight is 0, none.
    score: Literal["completion", "assistant", "last_turn"] = "completion"
    tools: tuple[dict, ...] | None = None  # for the chat template of rows without any

    # Batches. Sizes count pairs, over all devices.
    total_batch_size: int = 16  # pairs of one optimizer step
    gradient_accumulation_steps: int = 1  # microbatches that share those pairs
    num_train_epochs: int = 3  # times that every pair is used
    max_training_steps: int | None = None  # optimizer steps at which to stop anyway
    shuffle_train_dataset: bool = True  # False: file order
    drop_last: bool = False  # False: fill an epoch's last batch with weightless pairs
    # One row for all sequences of a device's microbatch, one after another, instead of
    # a padded row for each.
    packing: bool = False
    # What both sequences of a pair begin with goes through the model once.
    share_prompt: bool = False
    seed: int = 42  # of the order of pairs, of dropout, of a new adapter
    disable_dropout: bool = True  # False: drop as LoRA's lora_dropout says

    # Reports.
    log_steps: int = 10  # optimizer steps between two lines of metrics
    eval_steps: int | None = None  # optimizer steps between two; None: at the end only
    eval_batch_size: int | None = None  # pairs; None: as one microbatch
    use_tensorboard: bool = True  # event files in save_directory/tensorboard
    use_wandb: bool = False  # also log to Weights & Biases; needs the wandb package
    progress_bar: bool = True  # where the output is a terminal

    # Compare attention, rows and devices with plain ones before the first step, and its
    # metrics with what they are at the start.
    start_check: bool = True

    # What devices exchange goes on beside computation, where the compiler can do that.
    overlap_collectives: bool = True
    # Of the models' layers; auto: the fastest that the devices and the batches allow.
    attention: Literal["auto", "tiles", "cudnn", "splash", "tokamax"] = "auto"
    # How the scores are computed: see dpo_kernels.token_logprobs.
    workspace_bytes: int = 256 * 2**20  # bound on its temporaries
    implementation: str = "auto"  # or one that README lists under *Implementations*

    def __post_init__(self):
        self._read_schedule_options()
        check_types(self)
        object.__setattr__(self, "save_directory", expand(self.save_directory))
        check_choice("implementation", self.implementation, ("auto", *BACKENDS))
        self._check_ranges()
        self._check_combinations()

    @property
    def microbatch_size(self) -> int:
        """Pairs that go through the model at once, over all devices."""
        return self.total_batch_size // self.gradient_accumulation_steps

    @property
    def arrangement(self) -> Arrangement:
        """How sequences are laid out in rows."""
        return Arrangement(
            packing=self.packing,
            share_prompt=self.share_prompt,
            longest=self.max_length,
        )

    @property
    def pairs_per_eval_batch(self) -> int:
        """Pairs of one evaluation batch, over all devices."""
        return self.eval_batch_size or self.microbatch_size

    @property
    def without_reference(self) -> str | None:
        """The option for which nothing is measured from a reference, or None."""
        if self.reference_free:
            return "reference_free=True"
        return None if self.loss.reference else f"loss_type={self.loss_type!r}"

    def _check_ranges(self):
        for name in ("model_name", "save_directory"):
            if not getattr(self, name):
                raise InputError(f"{name}='' must not be empty")
        check_positive(self, "beta", "workspace_bytes")
        check_within(self, 1, _WORKSPACE_LIMIT, "workspace_bytes")
        check_count(self, "total_batch_size", "gradient_accumulation_steps")
        check_count(self, "num_train_epochs", "max_training_steps", "log_steps")
        check_count(self, "eval_steps", "eval_batch_size", "ref_model_sync_steps")
        check_within(self, 1, _MOST_PAIRS + 1, "total_batch_size", "eval_batch_size")
        check_count(self, "max_prompt_length", "max_completion_length")
        check_count(self, "max_length", low=2)  # one token to condition on
        check_within(self, 0, 0.5, "label_smoothing")
        check_float32(self)
        self._check_optimizer()
        self._check_checkpoints()
        self._check_evaluation(self.eval_steps)
        check_within(self, 0, 2**32, "seed")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise InputError(
                f"ref_model_mixup_alpha={self.ref_model_mixup_alpha!r} must be above 0 "
                "and at most 1 (1 copies the policy)"
            )

    def _check_combinations(self):
        if self.total_batch_size % self.gradient_accumulation_steps:
            raise InputError(
                f"total_batch_size={self.total_batch_size} must be a multiple of "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )
        self.check_loss()
        if self.without_reference:
            names = "sync_ref_model", "precompute_ref_log_probs", "offload_ref_model"
            check_unused(self, f"with {self.without_reference}", *names)
        if self.precompute_ref_log_probs:
            with_it = "with precompute_ref_log_probs, after which it is in no memory"
            check_unused(self, with_it, "offload_ref_model")
        if self.sync_ref_model and self.offload_ref_model:
            raise InputError(
                "offload_ref_model=True cannot be with sync_ref_model=True: a reference"
                " that follows the policy changes on the devices; remove one"
            )
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise InputError(
                "precompute_ref_log_probs=True cannot be with sync_ref_model=True: a "
                "reference that follows the policy has other log-probabilities after "
                "each sync; remove one"
            )
        if not self.sync_ref_model:
            names = "ref_model_sync_steps", "ref_model_mixup_alpha"
            check_unused(self, "without sync_ref_model", *names)
        if self.use_wandb and importlib.util.find_spec("wandb") is None:
            raise InputError(
                "use_wandb=True needs the wandb package: pip install wandb, or set it "
                "to false"
            )
