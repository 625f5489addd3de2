"""The device mesh, its axis names, and how every array is sharded over it."""

import enum
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from engine.errors import InputError, stage

DATA, FSDP, SEQUENCE, TENSOR = AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = (DATA, FSDP)  # rows of a batch
TOKENS = (*BATCH, SEQUENCE)  # tokens that go through a model
SPLIT = (FSDP, SEQUENCE)  # each parameter, besides what `tensor` does
VOCAB = (*SPLIT, TENSOR)  # rows of the embedding and of the head

ParameterPath = tuple[str, ...]  # of a parameter in the module


class Role(enum.Enum):
    """Along which axes a parameter is sharded; `parameter_spec` has the specs."""

    VOCAB = "vocab"  # [V, D]
    COLUMN = "column"  # [L, out, D], out sharded over tensor
    KV_COLUMN = "kv_column"  # the same, where the kv heads allow it
    ROW = "row"  # [L, D, in], in sharded over tensor
    COLUMN_BIAS = "column_bias"  # [L, out]
    KV_COLUMN_BIAS = "kv_column_bias"
    # Of an adapter beside such a weight: A is [L, rank, in], B is [L, out, rank].
    COLUMN_A = "column_a"
    COLUMN_B = "column_b"
    KV_COLUMN_B = "kv_column_b"
    ROW_A = "row_a"
    ROW_B = "row_b"
    REPLICATED = "replicated"


ADAPTERS = frozenset(
    {Role.COLUMN_A, Role.COLUMN_B, Role.KV_COLUMN_B, Role.ROW_A, Role.ROW_B}
)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter; a stacked one is `num_layers` tensors on disk."""

    hf_name: str  # with {} for the layer where stacked
    shape: tuple[int, ...]  # of one tensor on disk
    role: Role
    stacked: bool
    norm: bool = False
    trainable: bool = True  # else no gradient, no optimizer state


@runtime_checkable
class ModelShape(Protocol):
    """What a mesh must know of a model to shard it; `DecoderConfig` says it."""

    @property
    def vocab_size(self) -> int:
        """V: tokens that the embedding and the head have rows for."""
        ...

    @property
    def hidden_size(self) -> int:
        """D."""
        ...

    @property
    def num_layers(self) -> int:
        """L."""
        ...

    @property
    def num_heads(self) -> int:
        """N: query heads."""
        ...

    @property
    def num_kv_heads(self) -> int:
        """K."""
        ...

    @property
    def ffn_size(self) -> int:
        """F."""
        ...

    def parameters(self) -> Mapping[ParameterPath, Parameter]:
        """Every parameter by its path, in the order of the model's layers."""
        ...


def _all_devices() -> list[Any]:
    """The devices that JAX finds, or one line about why it finds none."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    what = f"JAX_PLATFORMS={asked!r} cannot be used" if asked else "JAX finds no device"
    with stage(what, "give one that is there (cpu, cuda, tpu), or unset it"):
        return list(jax.devices())


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    *,
    sequence: int = 1,
) -> Mesh:
    """A mesh over `devices` (all by default); one size may be -1: what is left."""
    devices = _all_devices() if devices is None else list(devices)
    sizes = {DATA: data, FSDP: fsdp, SEQUENCE: sequence, TENSOR: tensor}
    asked = mesh_words(sizes)
    unknown = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(unknown) > 1 or known < 1 or min(sizes.values()) < -1:
        raise InputError(
            f"sharding: {asked} must be positive, at most one of them -1 (what is left)"
        )
    if unknown:
        sizes[unknown[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"sharding: {asked} does not fit {len(devices)} devices; the "
            f"product must be {len(devices)}"
        )
    shape = tuple(sizes[axis] for axis in AXES)
    auto = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    except NotImplementedError:
        # Of a torus an axis takes whole dimensions, unless it is told not to.
        found = create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(found, AXES, axis_types=auto)


def mesh_words(sizes: Mapping[str, int]) -> str:
    """The sizes of a mesh's axes as a user gives them; what is not used is left out."""
    used = {x: size for x, size in sizes.items() if x != SEQUENCE or size != 1}
    return ", ".join(f"{axis}={size}" for axis, size in used.items())


def check_mesh(config: ModelShape, mesh: Mesh) -> None:
    """Raises InputError where the mesh does not divide the model."""
    tensor = mesh.shape[TENSOR]
    split = FSDP if mesh.shape[SEQUENCE] == 1 else f"{FSDP} * {SEQUENCE}"
    for name, size, axis, parts in (
        ("hidden_size", config.hidden_size, split, size_of(SPLIT, mesh)),
        ("num_attention_heads", config.num_heads, TENSOR, tensor),
        ("intermediate_size", config.ffn_size, TENSOR, tensor),
    ):
        if size % parts:
            raise InputError(
                f"sharding: {axis}={parts} does not divide the model's {name}={size}; "
                f"use a divisor of {size}"
            )
    kv = config.num_kv_heads
    if kv % tensor and tensor % kv:
        raise InputError(
            f"sharding: {TENSOR}={tensor} must divide the model's num_key_value_heads="
            f"{kv} or be a multiple of it"
        )


def size_of(axes: Sequence[str], mesh: Mesh) -> int:
    """Devices along some axes together."""
    return math.prod(mesh.shape[axis] for axis in axes)


def padded_vocab(config: ModelShape, mesh: Mesh) -> int:
    """Rows of the stored embedding and head: a multiple of the devices they are on."""
    parts = size_of(VOCAB, mesh)
    return -(-config.vocab_size // parts) * parts


def stored_shape(
    parameter: Parameter, config: ModelShape, mesh: Mesh
) -> tuple[int, ...]:
    """Shape in memory: layers stacked, vocabulary padded."""
    if parameter.role is Role.VOCAB:
        return (padded_vocab(config, mesh), *parameter.shape[1:])
    lead = (config.num_layers,) if parameter.stacked else ()
    return (*lead, *parameter.shape)


def parameter_spec(parameter: Parameter, config: ModelShape, mesh: Mesh) -> P:
    """The spec of one parameter; kv heads fewer than `tensor` stay whole on it."""
    kv = TENSOR if config.num_kv_heads % mesh.shape[TENSOR] == 0 else None
    return {
        Role.VOCAB: P(VOCAB, None),
        Role.COLUMN: P(None, TENSOR, SPLIT),
        Role.KV_COLUMN: P(None, kv, SPLIT),
        Role.ROW: P(None, SPLIT, TENSOR),
        Role.COLUMN_BIAS: P(None, TENSOR),
        Role.KV_COLUMN_BIAS: P(None, kv),
        Role.COLUMN_A: P(None, None, SPLIT),
        Role.COLUMN_B: P(None, TENSOR, None),
        Role.KV_COLUMN_B: P(None, kv, None),
        Role.ROW_A: P(None, None, TENSOR),
        Role.ROW_B: P(None, SPLIT, None),
        Role.REPLICATED: P(),
    }[parameter.role]


class Frozen(nnx.Variable):
    """A parameter that is not trained."""


def variable_type(parameter: Parameter) -> type[nnx.Variable]:
    """What a parameter is in a module: `nnx.Param` where it is trained."""
    return nnx.Param if parameter.trainable else Frozen


def place(spec: P, mesh: Mesh) -> NamedSharding:
    """The sharding of an array that goes into a compiled step or comes out of one.

    Axes of length 1 are left out, as JAX leaves them out of what comes out: an array
    that had them would be of another type, and the step would be compiled again for it.
    """

    def kept(entry: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        axes = (entry,) if isinstance(entry, str) else entry or ()
        axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        return axes[0] if len(axes) == 1 else axes or None

    entries = [kept(entry) for entry in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return NamedSharding(mesh, P(*entries))


def whole(array: jax.Array) -> Sharding:
    """That of a result which every process can read, on the devices of an array."""
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, P())
    return sharding


def param_specs(config: ModelShape, mesh: Mesh) -> nnx.State[str, Any]:
    """A PartitionSpec for each parameter, in the tree of `nnx.state(model)`."""
    specs = {
        path: variable_type(parameter)(parameter_spec(parameter, config, mesh))
        for path, parameter in config.parameters().items()
    }
    return nnx.State(unflatten_dict(specs))
