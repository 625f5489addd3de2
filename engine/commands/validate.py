"""`dpo validate`: check a run file, and print what would be run."""

from engine.commands.inputs import prepare_run
from engine.config.run import RunConfig
from engine.data.doubts import warn
from engine.data.pair_streams import PairStream
from engine.training.continuation import check_continuation
from engine.training.describe import describe, lines
from engine.training.identity import flat


def main(run: RunConfig) -> None:
    """Check a run file, its checkpoints and its data; load no weights.

    Raises:
        InputError: whatever training would refuse.
    """
    prepared = prepare_run(run)
    facts = describe(prepared)
    if (found := check_continuation(prepared, flat(run))) is not None:
        facts["goes on"] = f"from {found.checkpoint}"
        if found.changes:
            facts["changed"] = "; ".join(found.changes)
    if isinstance(prepared.train, PairStream):
        _warn_of_head(prepared.train)
    print(lines(facts))
    print("valid")


def _warn_of_head(stream: PairStream) -> None:
    """Logs what the first rows are doubted for: training does so after a pass."""
    chunk, pairs = stream.head
    for doubt in pairs.doubts:
        where = f"the first {len(chunk.rows)} rows"
        warn(doubt, where, chunk, chunk.ignored(doubt.first))
