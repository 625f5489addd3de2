"""What a process asks of all, which all know one step later."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int32

from engine.parallel import processes


class Asked(NamedTuple):
    """What is asked for after a step; 0: nothing."""

    stop: int = 0  # a signal's number
    save: int = 0  # 1 where it is time


class Agreement:
    """Steps at which all processes do the same, whichever of them was told to.

    The largest of what they ask for is computed on the devices behind a step, and read
    when the next one runs, so that nothing waits for it. Of a single process what it
    asks for is known at once.
    """

    def __init__(self, mesh: Mesh):
        self._several = processes.count() > 1
        self._before: Array | None = None
        if self._several:
            names = mesh.axis_names
            self._sharding = NamedSharding(mesh, P(names, None))
            self._shape = mesh.size, len(Asked._fields)
            # Compiled here: nothing is during a run.
            abstract = jax.ShapeDtypeStruct(
                self._shape, np.int32, sharding=self._sharding
            )
            self._most = (
                jax.jit(_most, out_shardings=NamedSharding(mesh, P()))
                .lower(abstract)
                .compile()
            )

    def __call__(self, asked: Asked) -> Asked:
        """What all were asking for after the step before; each step asks once."""
        if not self._several:
            return asked
        row = np.array([asked], np.int32)
        # Each device has a row.
        given = jax.make_array_from_callback(self._shape, self._sharding, lambda _: row)
        before, self._before = self._before, self._most(given)
        if before is None:
            return Asked()
        return Asked(*(int(x) for x in np.asarray(before)))

    def forget(self) -> None:
        """What was asked for is done."""
        self._before = None


def _most(asked: Int32[Array, "devices n"]) -> Int32[Array, " n"]:
    return jnp.max(asked, axis=0)
