"""One decoder for every family: hidden states in, hidden states out, never logits."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from engine.errors import InputError
from engine.models.architecture import DecoderConfig
from engine.models.attention import Case, attend, choose, laid_out
from engine.models.dropout import Dropout, prefix_hashes
from engine.models.embed import look_up
from engine.models.linear import Linears
from engine.models.mlp import mlp, tile_of
from engine.models.remat import AUTO, BLOCK_OUT, LAYER_IN, REMAT, policy, recomputes
from engine.models.rope import rope_tables, rotate
from engine.parallel.batch import PADDED, Arrangement, KeySpans
from engine.parallel.host_memory import on_device
from engine.parallel.row_parts import RowParts
from engine.parallel.sharding import (
    TENSOR,
    ParameterPath,
    variable_type,
)

DTYPES = ("bfloat16", "float16", "float32")


def rms_norm(
    x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float, plus_one: bool
) -> Float[Array, "... D"]:
    """x / rms(x) * weight, float32 inside; `plus_one` (gemma): weight + 1."""
    weight = weight.astype(x.dtype).reshape((1,) * (x.ndim - 1) + weight.shape)
    x_f32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True)
    normed = x_f32 * lax.rsqrt(mean_square + eps)
    if plus_one:
        return (normed * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return normed.astype(x.dtype) * weight


class Decoder(nnx.Module):
    """A stack of decoder layers whose weights are sharded over a mesh.

    Weights keep Hugging Face's orientation [out, in] and are stacked on a leading layer
    axis. Call it inside `jax.shard_map` over `mesh`, with `param_specs` for its state.
    Weights in the host's memory come to the device a layer at a time.
    """

    def __init__(
        self,
        config: DecoderConfig,
        arrays: Mapping[tuple[str, ...], Any],
        *,
        mesh: Mesh,
        dtype: str = "bfloat16",
        remat: str = "full",
        reduce_dtype: str | None = None,
        mlp_tile: int | None = None,
    ):
        """`arrays`: a value for each path of `config.parameters()`.

        reduce_dtype: of the sums of layers' gradients over `fsdp`; None: `dtype`.
        mlp_tile: tokens of which MLPs are computed at a time where a layer is computed
            again for its gradient; None: `tile_of` the mesh, 0: all.
        """
        if dtype not in DTYPES:
            raise InputError(f"model dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
        if remat not in (AUTO, *REMAT):
            allowed = ", ".join((AUTO, *REMAT))
            raise InputError(f"model remat={remat!r}; allowed: {allowed}")
        self.config = config
        self.mesh = mesh
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        self.reduce_dtype = reduce_dtype or dtype
        self.mlp_tile = mlp_tile
        variables = {
            path: variable_type(parameter)(arrays[path])
            for path, parameter in config.parameters().items()
        }
        layers = {path[1]: x for path, x in variables.items() if path[0] == "layers"}
        self.layers = nnx.Dict(layers)
        self.embed = variables["embed",]
        self.final_norm = variables["final_norm",]
        if not config.tie_word_embeddings:
            self.head = variables["head",]

    @property
    def hf_config(self) -> dict[str, Any]:
        """`config.json` as it was read."""
        return self.config.hf_config

    def variables(self) -> dict[ParameterPath, nnx.Variable]:
        """Its parameters, by the paths of `config.parameters()`."""
        found = {("embed",): self.embed, ("final_norm",): self.final_norm}
        if not self.config.tie_word_embeddings:
            found["head",] = self.head
        return found | {("layers", name): x for name, x in self.layers.items()}

    def head_weight(self) -> Float[Array, "V_local D"]:
        """This device's rows of the head in the compute dtype; padding comes last."""
        head = self.embed if self.config.tie_word_embeddings else self.head
        return on_device(head[...]).astype(self.dtype)

    def __call__(
        self,
        tokens: Int[Array, "R S"],
        dropout_key: Key[Array, ""] | None = None,
        spans: KeySpans | None = None,
        *,
        arrangement: Arrangement = PADDED,
        attention: str = "auto",
    ) -> Float[Array, "R s D"]:
        """Hidden states after the final norm, of this device's rows, right-padded.

        Where rows are spread over devices, of its part of them: see `RowParts`.

        dropout_key: of a step of training; None, and nothing is dropped.
        spans: which keys each token sees; None: all before it.
        arrangement: of the rows, which the spans are of.
        attention: an implementation's name, or auto.
        """
        config = self.config
        parts = RowParts.of(tokens.shape[1])
        tokens, spans = parts.pad(tokens, spans)
        layers = {name: param[...] for name, param in self.layers.items()}
        kinds, rope = _layer_inputs(config, parts, spans)
        case = Case.of(self.mesh, arrangement, self.dtype, config)
        name = choose(attention, case)
        attend_as = functools.partial(
            attend,
            name,
            scale=config.query_scale,
            softcap=config.attn_softcap,
            windows=config.windows,
            spans=laid_out(name, parts.own(spans), arrangement),
            longest=arrangement.longest,
            starts=parts.starts,
            key_begin=None if spans is None else jnp.asarray(spans.begin),
            device=self.mesh.devices.flat[0],
        )
        tile = tile_of(self.mesh) if self.mlp_tile is None else self.mlp_tile
        tile = tile if recomputes(self.remat) else 0
        dropout_of = self._dropout(parts, tokens, dropout_key, spans)

        def layer(hidden, xs):
            number, weights, *kinds = xs
            hidden = checkpoint_name(hidden, LAYER_IN)
            return _layer(
                config,
                hidden,
                jax.tree.map(on_device, weights),
                *kinds,
                rope=rope,
                attend=attend_as,
                parts=parts,
                dropout=dropout_of(number),
                reduce_dtype=self.reduce_dtype,
                tile=tile,
            ), None

        layer = jax.checkpoint(layer, policy=policy(self.remat), prevent_cse=False)
        number_L = jnp.arange(config.num_layers, dtype=jnp.int32)
        table = on_device(self.embed[...])
        hidden = look_up(table, tokens, parts, self.dtype)
        hidden *= jnp.asarray(config.embed_scale, self.dtype)
        hidden, _ = lax.scan(layer, hidden, (number_L, layers, *kinds))
        final_norm = on_device(self.final_norm[...])
        return rms_norm(hidden, final_norm, config.rms_eps, config.gemma)

    def _dropout(
        self,
        parts: RowParts,
        tokens: Array,
        key: Array | None,
        spans: KeySpans | None,
    ) -> Callable[[Array], Any]:
        """Of a layer by its number, what drops elements there, or None."""
        adapter = self.config.adapter
        if adapter is None or not adapter.dropout or key is None:
            return lambda number: None
        rate, prefixes_RS = adapter.dropout, parts.own(prefix_hashes(tokens, spans))

        def of_layer(number: Array) -> Dropout:
            key_of_layer = jax.random.fold_in(key, number)
            return Dropout(rate=rate, key=key_of_layer, prefixes=prefixes_RS)

        return of_layer


def _layer_inputs(config: DecoderConfig, parts: RowParts, spans: KeySpans | None):
    """Numbers of each layer's window and rope for the scan, and the rope tables."""
    windows = [config.windows.index(window) for window in config.window_of_layer]
    window_L = jnp.asarray(windows, jnp.int32)
    kinds = tuple(dict.fromkeys(config.ropes))
    kind_L = jnp.asarray([kinds.index(rope) for rope in config.ropes], jnp.int32)
    positions = jnp.arange(parts.padded)[None] if spans is None else spans.positions
    tables = rope_tables(kinds, config.head_dim, parts.own(positions))
    return (window_L, kind_L), tables


def _kv_slice(config: DecoderConfig, x: Array) -> Array:
    """The kv head that this device's query heads read, where `tensor` exceeds them."""
    tensor = lax.axis_size(TENSOR)
    if config.num_kv_heads % tensor == 0:
        return x
    head = lax.axis_index(TENSOR) // (tensor // config.num_kv_heads)
    return lax.dynamic_slice_in_dim(x, head * config.head_dim, config.head_dim, axis=0)


def _layer(
    config: DecoderConfig,
    hidden,
    weights,
    window,
    kind,
    *,
    rope,
    attend,
    parts,
    dropout,
    reduce_dtype,
    tile,
):
    """One layer: `weights` are this device's shards, `hidden` is whole on `tensor`."""

    def norm(name: str, x: Array) -> Array:
        return rms_norm(x, weights[name], config.rms_eps, config.gemma)

    def on_each(x: Array) -> Array:
        # Here, not at each use: one sum over `tensor` in the backward pass, not three.
        return lax.pcast(x, TENSOR, to="varying")

    linears = Linears(
        weights=weights,
        adapter=config.adapter,
        dropout=dropout,
        reduce_dtype=reduce_dtype,
    )
    column = linears.column

    def row(x: Array, name: str) -> Array:
        return checkpoint_name(linears.row(x, name), BLOCK_OUT)

    def heads(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, config.head_dim)

    def kv_cut(x: Array) -> Array:
        return _kv_slice(config, x)

    normed = on_each(norm("attn_norm", hidden))
    query = heads(column(normed, "q"))
    key, value = (heads(column(normed, name, kv_cut)) for name in ("k", "v"))
    if config.qk_norm:
        query, key = norm("q_norm", query), norm("k_norm", key)
    cos, sin = (table[kind] for table in rope)
    attended = attend(
        rotate(query, cos, sin),
        parts.gather(rotate(key, cos, sin)),
        parts.gather(value),
        which=window,
    )
    out = row(attended.reshape(*attended.shape[:2], -1), "o")
    hidden = hidden + (norm("attn_post_norm", out) if config.gemma else out)

    normed = on_each(norm("mlp_norm", hidden))
    out = checkpoint_name(mlp(linears, normed, config.activation, tile), BLOCK_OUT)
    return hidden + (norm("mlp_post_norm", out) if config.gemma else out)
