import pytest

from engine.config.run import ShardingConfig, load_run_config
from engine.planning.changes import smallest_changes
from tests.engine.planning.fakes import FakePlanner
from tests.engine.planning.runs import tiny_run


def run_of(tmp_path, **options):
    options = {
        "total_batch_size": 32,
        "sharding": ShardingConfig(data=4, fsdp=1),
    } | options
    return tiny_run(tmp_path, **options)


def found(run, planner):
    return [x.overrides for x in smallest_changes(run, planner)]


@pytest.mark.parametrize(
    ("peak", "changes"),
    [
        # Two pairs at once, of eight.
        (
            lambda run, pairs: 60 + 20 * pairs,
            [("trainer.gradient_accumulation_steps=4",)],
        ),
        # As soon as anything is recomputed.
        (
            lambda run, pairs: 90 + 20 * (run.model.remat == "none"),
            [("model.remat=dots",)],
        ),
        (
            lambda run, pairs: 90 + 20 * (run.model.remat != "full"),
            [("model.remat=full",)],
        ),
        # Parameters over all devices; heads over two of them.
        (
            lambda run, pairs: 50 + 200 / (4 if run.sharding.fsdp == 4 else 1),
            [("sharding.data=1", "sharding.fsdp=4", "sharding.tensor=1")],
        ),
        (
            lambda run, pairs: 50 + 100 / run.sharding.tensor,
            [("sharding.data=1", "sharding.fsdp=2", "sharding.tensor=2")],
        ),
        (
            lambda run, pairs: 150 - 60 * run.trainer.precompute_ref_log_probs,
            [("trainer.precompute_ref_log_probs=true",)],
        ),
        # Several by themselves.
        (
            lambda run, pairs: 85 + 5 * pairs - 30 * (run.model.remat == "full"),
            [("trainer.gradient_accumulation_steps=4",), ("model.remat=full",)],
        ),
        # An adapter where nothing else serves, and nothing at all.
        (
            lambda run, pairs: 300 if run.lora is None else 10,
            [("lora.r=16", "lora.lora_alpha=32", "lora.target_modules=all-linear")],
        ),
        (lambda run, pairs: 300, []),
    ],
)
def test_the_smallest_change_of_each_kind_is_found(tmp_path, peak, changes):
    assert found(run_of(tmp_path, remat="none"), FakePlanner(peak)) == changes


def test_where_none_serves_by_itself_they_are_put_together(tmp_path):
    def peak(run, pairs):
        less = 40 * (run.model.remat == "full") + 40 * (run.sharding.fsdp == 4)
        return 150 + 5 * pairs - less

    [overrides] = found(run_of(tmp_path, remat="none"), FakePlanner(peak))
    assert overrides == (
        *("model.remat=full", "sharding.data=1", "sharding.fsdp=4"),
        *("sharding.tensor=1", "trainer.precompute_ref_log_probs=true"),
        "trainer.gradient_accumulation_steps=2",
    )


def test_rows_go_over_several_devices_where_one_has_no_memory_for_a_pair(tmp_path):
    """In as many more microbatches; what else was tried stays."""

    def peak(run, pairs):
        return 300 * pairs / run.sharding.sequence

    [overrides] = found(run_of(tmp_path), FakePlanner(peak))
    assert overrides == (
        *("sharding.data=1", "sharding.fsdp=1", "sharding.tensor=1"),
        "trainer.precompute_ref_log_probs=true",
        *("trainer.gradient_accumulation_steps=32", "sharding.sequence=4"),
    )


def test_rows_are_arranged_otherwise_where_that_makes_the_batch_smaller(tmp_path):
    def share(arguments):
        return (0.5 if arguments.share_prompt else 1) * (
            0.9 if arguments.packing else 1
        )

    def peak(run, pairs):
        return 200 * share(run.trainer)

    run = run_of(tmp_path)
    both = ("trainer.share_prompt=true", "trainer.packing=true")
    assert found(run, FakePlanner(peak, share=share)) == [both[:1]]
    tight = FakePlanner(lambda run, pairs: peak(run, pairs) + 5, share=share)
    assert found(run, tight) == [both]
    # By max_length alone nothing is known to be shared: then none is compiled.
    blind = FakePlanner(peak)
    assert found(run, blind) == []
    assert not [x for x in blind.compiled if "packing" in x or "share_prompt" in x]


def test_what_holds_too_much_is_not_compiled(tmp_path):
    planner = FakePlanner(lambda run, pairs: 300, held=lambda run: 101)
    assert found(run_of(tmp_path, remat="none"), planner) == []
    assert planner.compiled == []


def test_what_would_mean_nothing_is_not_proposed(tmp_path):
    planner = FakePlanner(lambda run, pairs: 300)
    found(run_of(tmp_path, reference_free=True), planner)
    assert not [x for x in planner.compiled if "precompute" in x]
    synced = FakePlanner(lambda run, pairs: 300)
    found(run_of(tmp_path, sync_ref_model=True), synced)
    assert synced.compiled
    assert not [x for x in synced.compiled if "precompute" in x or "lora" in x]


def test_overrides_are_what_a_user_types(tmp_path):
    """Each change makes the very run that was planned."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"config:\n  model: {{name_or_path: {tmp_path}, remat: none}}\n"
        "  mixture: {informs: [{data_files: none.jsonl}]}\n"
        "  sharding: {data: 4, fsdp: 1}\n"
        "  trainer: {total_batch_size: 32, max_length: 64}\n"
    )
    run = load_run_config(path)
    seen = []

    def peak(changed, pairs):
        seen.append(changed)
        return 300

    planner = FakePlanner(peak)
    smallest_changes(run, planner)
    assert len(seen) == len(planner.compiled) > 6
    for words, changed in zip(planner.compiled, seen, strict=True):
        overrides = words.removeprefix("with ").split(" ")
        assert load_run_config(path, overrides) == changed
