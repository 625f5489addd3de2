"""The smallest changes that make a run fit, each of them compiled."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from engine.config.dpo import DPOConfig
from engine.config.lora import LoraConfig
from engine.config.run import RunConfig
from engine.errors import InputError
from engine.models.remat import REMAT, Remat
from engine.planning.account import Account
from engine.planning.planner import Planner
from engine.planning.steps import with_options

_RANK = 16
_MOST_TENSOR = 8


class Variant(NamedTuple):
    """A run with something changed, as `key=value` overrides."""

    overrides: tuple[str, ...]
    run: RunConfig


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """A change with which a run fits."""

    overrides: tuple[str, ...]
    account: Account


def accumulations(run: RunConfig, shards: int) -> Iterator[Variant]:
    """More microbatches of fewer pairs, down to one pair a device."""
    now, total = run.trainer.gradient_accumulation_steps, run.trainer.total_batch_size
    steps = 2 * now
    while total % (steps * shards) == 0:
        yield Variant(
            (f"trainer.gradient_accumulation_steps={steps}",),
            with_options(run, gradient_accumulation_steps=steps),
        )
        steps *= 2


def remats(run: RunConfig) -> Iterator[Variant]:
    """What keeps less for the backward pass."""
    if run.model.remat == "auto":  # which has tried them
        return
    for remat in REMAT[REMAT.index(run.model.remat) + 1 :]:
        if remat != "offload":
            yield _with_remat(run, remat)


def offloads(run: RunConfig, platform: str) -> Iterator[Variant]:
    """What is kept for the backward pass in the host's memory, if it has its own."""
    if platform != "cpu" and run.model.remat not in ("auto", "offload"):
        yield _with_remat(run, "offload")


def _with_remat(run: RunConfig, remat: Remat) -> Variant:
    model = replace(run.model, remat=remat)
    return Variant((f"model.remat={remat}",), replace(run, model=model))


def meshes(run: RunConfig, devices: int) -> Iterator[Variant]:
    """Parameters over all devices; then each layer's work over more and more.

    Rows stay spread over as many devices as they are.
    """
    tensor, devices = 1, devices // run.sharding.sequence
    while tensor <= min(devices, _MOST_TENSOR):
        if devices % tensor == 0:
            sizes = {"data": 1, "fsdp": devices // tensor, "tensor": tensor}
            changed = replace(run, sharding=replace(run.sharding, **sizes))
            yield Variant(
                tuple(f"sharding.{axis}={size}" for axis, size in sizes.items()),
                changed,
            )
        tensor *= 2


def sequences(run: RunConfig) -> Iterator[Variant]:
    """Each row over more and more devices, in as many more microbatches.

    With no more of these a device would have as many tokens at once as before.
    """
    sharding, parts = run.sharding, 2
    while sharding.fsdp > 0 and sharding.fsdp % parts == 0:
        sizes = {
            "fsdp": sharding.fsdp // parts,
            "sequence": sharding.sequence * parts,
        }
        steps = run.trainer.gradient_accumulation_steps * parts
        changed = replace(run, sharding=replace(sharding, **sizes))
        yield Variant(
            (
                *(f"sharding.{axis}={size}" for axis, size in sizes.items()),
                f"trainer.gradient_accumulation_steps={steps}",
            ),
            with_options(changed, gradient_accumulation_steps=steps),
        )
        parts *= 2


def arrangements(run: RunConfig) -> Iterator[Variant]:
    """Fewer tokens through the model: what pairs share once, and no padding."""
    arguments = run.trainer
    for options in (
        {"share_prompt": True},
        {"packing": True},
        {"share_prompt": True, "packing": True},
    ):
        options = {x: True for x in options if not _is_on(arguments, x)}
        if options:
            yield Variant(
                tuple(f"trainer.{name}=true" for name in options),
                with_options(run, **options),
            )


def _is_on(arguments: DPOConfig, name: str) -> bool:
    return {"packing": arguments.packing, "share_prompt": arguments.share_prompt}[name]


def references(run: RunConfig, platform: str) -> Iterator[Variant]:
    """The reference's log-probabilities scored before, its weights gone.

    Where they cannot be, and pairs stream past: its weights in the host's memory. Only
    a TPU's compiler, away from its devices, says what that saves.
    """
    arguments = run.trainer
    if arguments.precompute_ref_log_probs or arguments.without_reference:
        return
    options = ["precompute_ref_log_probs"]
    if platform == "tpu" and run.lora is None:
        options.append("offload_ref_model")
    for option in options:
        # An error beside a reference that follows the policy; of the first: a stream.
        with contextlib.suppress(InputError):
            changed = with_options(run, **{option: True})
            yield Variant((f"trainer.{option}=true",), changed)
            return


def adapters(run: RunConfig) -> Iterator[Variant]:
    """Only an adapter trained. That is another result: it comes last."""
    if run.lora is not None or run.trainer.sync_ref_model:
        return
    lora = LoraConfig(r=_RANK, lora_alpha=2.0 * _RANK, target_modules="all-linear")
    yield Variant(
        (f"lora.r={_RANK}", f"lora.lora_alpha={2 * _RANK}")
        + ("lora.target_modules=all-linear",),
        replace(run, lora=lora),
    )


def smallest_changes(run: RunConfig, planner: Planner) -> list[Fitting]:
    """For each kind of change its smallest that makes the run fit, by itself.

    Where none does, all of them one after the other until it fits; an adapter only
    where nothing else serves.
    """
    _, shards, _ = planner.step(run).run.plan.grid
    kinds = [
        list(accumulations(run, shards)),
        [*remats(run), *offloads(run, planner.target.chip.platform)],
        _fewer_positions(run, planner),
        [x for x in meshes(run, planner.target.count) if x.run != run],
        list(references(run, planner.target.chip.platform)),
    ]
    found = [x for x in (_smallest(kind, planner) for kind in kinds) if x is not None]
    if not found:
        together = _together(run, planner)
        found = [together] if together else []
    if not found:
        found = [x for x in (_smallest(list(adapters(run)), planner),) if x]
    return found


def _fewer_positions(run: RunConfig, planner: Planner) -> list[Variant]:
    """Arrangements that make the largest batch smaller, in their order.

    By the options alone none does: nothing is known to be shared, or shorter.
    """
    now = planner.step(run).positions
    found = []
    for variant in arrangements(run):
        if planner.step(variant.run).positions < now:
            found.append(variant)
    return found


def _tried(variant: Variant, planner: Planner) -> Fitting | None:
    """The variant, if it can be and fits."""
    try:
        step = planner.step(variant.run)
    except InputError:  # of a mesh that does not divide the model, or the batch
        return None
    if planner.hopeless(step):
        return None
    account = planner.account(variant.run, f"with {' '.join(variant.overrides)}")
    fits = account.fits
    return Fitting(overrides=variant.overrides, account=account) if fits else None


def _smallest(variants: Sequence[Variant], planner: Planner) -> Fitting | None:
    """The first that fits."""
    for variant in variants:
        if (found := _tried(variant, planner)) is not None:
            return found
    return None


def _together(run: RunConfig, planner: Planner) -> Fitting | None:
    """Changes on top of each other until it fits; the result stays the same."""
    overrides: tuple[str, ...] = ()
    kinds = "remat", "arrangement", "mesh", "precompute", "accumulation", "sequence"
    for kind in kinds:
        match kind:
            case "remat":
                more = list(remats(run))[-1:]
            case "arrangement":
                more = _fewer_positions(run, planner)[-1:]
            case "mesh":
                more = list(meshes(run, planner.target.count))[:1]
            case "precompute":
                more = list(references(run, planner.target.chip.platform))
            case "accumulation":
                _, shards, _ = planner.step(run).run.plan.grid
                more = list(accumulations(run, shards))
            case _:
                more = list(sequences(run))
        for variant in more:
            words = _joined(overrides, variant.overrides)
            found = _tried(Variant(words, variant.run), planner)
            if found is not None:
                return found
        if more:
            overrides, run = _joined(overrides, more[-1].overrides), more[-1].run
    return None


def _joined(before: Sequence[str], after: Sequence[str]) -> tuple[str, ...]:
    """Overrides of which later ones replace earlier ones of the same key."""
    found = {x.partition("=")[0]: x for x in (*before, *after)}
    return tuple(found.values())
