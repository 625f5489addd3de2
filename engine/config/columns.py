"""What the columns of a source are called in its files: `columns:` of a source."""

import dataclasses
from dataclasses import dataclass

from engine.config.fields import check_types
from engine.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """By the name that is read: the file's own. None: it is called the same."""

    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    conversations: str | None = None
    system: str | None = None
    chosen_messages: str | None = None
    rejected_messages: str | None = None
    prompt_ids: str | None = None
    chosen_ids: str | None = None
    rejected_ids: str | None = None
    tools: str | None = None
    chat_template_kwargs: str | None = None
    weight: str | None = None

    def __post_init__(self):
        check_types(self)
        taken: dict[str, str] = {}
        for name, column in self.names().items():
            if not column:
                raise InputError(f"{name}='' must not be empty")
            if column in taken:
                raise InputError(
                    f"{name}={column!r} is what {taken[column]} names, too; each "
                    "column is read as one thing"
                )
            taken[column] = name

    def names(self) -> dict[str, str]:
        """The file's name of each column that is named here."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: column for name, column in values.items() if column is not None}
