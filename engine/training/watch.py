"""A warning about what often goes wrong in silence, from the metrics that are there."""

import logging
from dataclasses import dataclass

from engine.training.events import Listener, Record

logger = logging.getLogger(__name__)

_NATS = 0.05  # a token: it has become 5 % less likely
_LINES = 3
_STEPS = 20
_SHARE = 0.1  # of the run


@dataclass
class _Fall:
    """A stretch of lines in which the chosen answers are less likely than before."""

    step: int  # of the first line
    margin: float  # then
    lines: int = 0


class FallingChosen(Listener):
    """Warns once where chosen answers stay less likely than under the reference.

    The losses ask for a margin, and it also grows where both answers become less
    likely, the rejected one faster. Training and each evaluation set are looked at by
    themselves.
    """

    def __init__(self):
        self._falls: dict[str, _Fall] = {}
        self._warned: set[str] = set()
        self._long = _STEPS

    def started(self, total_steps: int, done: int) -> None:
        """Learn how long the run is."""
        self._long = max(_STEPS, _SHARE * total_steps)

    def recorded(self, record: Record) -> None:
        """Look at a line."""
        ratio = record.metric("log_ratio/chosen")
        margin = record.metric("rewards/margins")
        if ratio > -_NATS:
            self._falls.pop(record.prefix, None)
            return
        fall = self._falls.setdefault(record.prefix, _Fall(record.step, margin))
        fall.lines += 1
        steps = record.step - fall.step
        if fall.lines < _LINES or steps < self._long or margin <= fall.margin:
            return
        if record.prefix in self._warned:
            return
        self._warned.add(record.prefix)
        logger.warning(
            "%slog_ratio/chosen is %.2f: for %d steps the chosen answers have been "
            "less likely than under the reference, while the margin grew from %.2f to "
            "%.2f; should answers get worse, try rpo_alpha, loss_type dpop or "
            "apo_zero, a larger beta or a lower learning_rate",
            record.prefix,
            ratio,
            steps,
            fall.margin,
            margin,
        )
