"""The batches of a run and of its evaluations, on the devices of a mesh."""

from jax.sharding import Mesh

from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan, Order
from engine.data.layouts import Layout, grid_of
from engine.data.pair_streams import PairStream
from engine.data.pair_tokens import PairTokens
from engine.data.stream_plans import StreamPlan
from engine.parallel.batch import own_shards
from engine.parallel.sharding import DATA, FSDP

_MOST_ROWS = 64  # that a message names


def plan_stream(config: DPOConfig, stream: PairStream, mesh: Mesh) -> StreamPlan:
    """The batches of the run.

    Raises:
        InputError: sizes that the mesh or the accumulation steps do not divide.
    """
    assert config.max_training_steps is not None, "check_streaming asks for it"
    return StreamPlan(
        stream,
        steps=config.max_training_steps,
        grid=grid_of(
            config.total_batch_size,
            config.gradient_accumulation_steps,
            _shards(mesh),
            "total_batch_size",
        ),
        shuffle=config.shuffle_train_dataset,
        seed=config.seed,
        drop_last=config.drop_last,
        own=own_shards(mesh),
        arrangement=config.arrangement,
    )


def _shards(mesh: Mesh) -> int:
    return mesh.shape[DATA] * mesh.shape[FSDP]


def plan_training(config: DPOConfig, pairs: PairTokens, mesh: Mesh) -> BatchPlan:
    """The batches of the run.

    Raises:
        InputError: sizes that the mesh or the accumulation steps do not divide.
    """
    size = config.total_batch_size
    layout = Layout(
        pairs,
        size,
        config.gradient_accumulation_steps,
        _shards(mesh),
        "total_batch_size",
        own_shards(mesh),
        config.arrangement,
    )
    order = Order(
        num_pairs=len(pairs),
        pairs_per_batch=size,
        shuffle=config.shuffle_train_dataset,
        seed=config.seed,
        drop_last=config.drop_last,
    )
    steps = config.num_train_epochs * order.batches_per_epoch
    if config.max_training_steps is not None:
        steps = min(steps, config.max_training_steps)
    return BatchPlan(order, layout, steps)


def plan_evaluation(config: DPOConfig, pairs: PairTokens, mesh: Mesh) -> BatchPlan:
    """The batches of one evaluation: every pair once, in order."""
    size = config.pairs_per_eval_batch
    order = Order(num_pairs=len(pairs), pairs_per_batch=size)
    option = "eval_batch_size" if config.eval_batch_size else "the evaluation's batch"
    layout = Layout(
        pairs,
        size,
        1,
        _shards(mesh),
        option,
        own_shards(mesh),
        config.arrangement,
    )
    return BatchPlan(order, layout)


def rows_of_batch(pairs: PairTokens, plan: BatchPlan, batch: int) -> str:
    """Which rows of the data the pairs of a batch come from, in words."""
    epoch, index = divmod(batch, plan.order.batches_per_epoch)
    members = plan.order.epoch(epoch)[index]
    rows = pairs.rows[members[members >= 0]].tolist()
    shown = ", ".join(map(str, rows[:_MOST_ROWS]))
    more = len(rows) - _MOST_ROWS
    return f"rows {shown}{f' and {more} more' if more > 0 else ''}, from 0"
