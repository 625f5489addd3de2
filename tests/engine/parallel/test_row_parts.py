"""What becomes of rows on the devices that their tokens are spread over."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from engine.parallel.batch import KeySpans
from engine.parallel.row_parts import RowParts, spread_rows
from engine.parallel.sharding import SEQUENCE
from tests.engine.tiny_models import mesh_of

R, S, C = 2, 10, 4  # rows of eight pieces of two tokens, of which six are padding
ROWS = np.arange(1, R * S + 1, dtype=np.int32).reshape(R, S)
PADDED = np.pad(ROWS, ((0, 0), (0, 6)))


def spread():
    """What each device has of the rows, and what is made of that."""

    def on_each(rows, positions):
        parts = RowParts.of(S)
        whole, spans = parts.pad(rows, KeySpans(rows, rows, rows))
        assert spans is not None
        own = parts.own(whole)
        index, mine = parts.find(positions)
        taken = own.reshape(-1, 1)[index].astype(jnp.float32)
        alike = whole[..., None] * (1 + lax.axis_index(SEQUENCE))
        return {
            "own": own[None],
            "starts": jnp.stack(parts.starts)[None],
            "gathered": parts.gather(own.astype(jnp.float32))[None],
            "spread": spread_rows(taken, mine),
            "sum": parts.sum_scatter(alike.astype(jnp.float32))[None],
            "spans": parts.own(spans).begin[None],
        }

    mesh = mesh_of((1, 1, 1, C))
    run = jax.shard_map(on_each, mesh=mesh, in_specs=(P(), P()), out_specs=P(SEQUENCE))
    # Eighteen of twenty, which four devices do not have equal shares of.
    return jax.device_get(jax.jit(run)(ROWS, np.arange(R * S - 2, dtype=np.int32)))


def test_devices_have_two_pieces_of_each_row():
    found = spread()
    for device in range(C):
        begins = 2 * device, 2 * (2 * C - 1 - device)
        want = np.concatenate([PADDED[:, x : x + 2] for x in begins], axis=1)
        assert tuple(found["starts"][device]) == begins
        np.testing.assert_array_equal(found["own"][device], want)
        np.testing.assert_array_equal(found["gathered"][device], PADDED)
        np.testing.assert_array_equal(found["sum"][device][:, :, 0], 10 * want)
    # Padding sees itself alone.
    np.testing.assert_array_equal(found["spans"][0][:, 2:], [[14, 15]] * R)
    # In the order of the positions, an equal share of them each.
    np.testing.assert_array_equal(found["spread"][:, 0], [*range(1, 19), 0, 0])
