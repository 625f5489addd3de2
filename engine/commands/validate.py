"""`dpo validate`: check a run file, and print what would be run."""

from engine.commands.inputs import prepare_run
from engine.config.run import RunConfig
from engine.training.describe import describe, lines


def main(run: RunConfig) -> None:
    """Check a run file, its checkpoints and its data; load no weights.

    Raises:
        InputError: whatever training would refuse.
    """
    print(lines(describe(prepare_run(run))))
    print("valid")
