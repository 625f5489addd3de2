"""`dpo show`: every option of a run as it will be, and where it comes from."""

from engine.config.provenance import resolved


def main(path: str, overrides: list[str]) -> None:
    """Print the configuration as a run file that may be run as it is.

    Raises:
        InputError: a run file or an override that is wrong in itself.
    """
    print(resolved(path, overrides))
