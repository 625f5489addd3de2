"""What checks annotated functions under pytest; named in pyproject.toml."""

from beartype import BeartypeConf, beartype

# As for static checkers, a float parameter takes an int.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
