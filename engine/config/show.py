"""What a configuration's fields are where nobody has set them."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from engine.config.run_file import dataclass_in


def plain(value: Any) -> Any:
    """A configuration as JSON and YAML have it: mappings, lists and single values."""
    if dataclasses.is_dataclass(value):
        return {
            f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def defaults(cls: type, prefix: str = "") -> dict[str, Any]:
    """By dotted key, the plain defaults of a dataclass and of those inside it.

    Those of the entries of a list have index 0.
    """
    hints = typing.get_type_hints(cls)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        key, nested = prefix + field.name, hints[field.name]
        section, is_list = dataclass_in(nested)
        if section is not None:
            found |= defaults(section, f"{key}.{'0.' if is_list else ''}")
        elif field.default is not dataclasses.MISSING:
            found[key] = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            found[key] = plain(field.default_factory())
    return found
