"""Compiles value-and-gradient of `token_logprobs` for devices that need not be here."""

from typing import Any

from bench.op.memory import STATS

# Name, options: as anybody may call it, as the engine does, and with everything on.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {}),
    ("engine", {"num_valid": True, "stats": STATS}),
    (
        "everything",
        {
            "num_valid": True,
            "bias": True,
            "softcap": 30.0,
            "scale": 0.7,
            "stats": ("entropy", "collision", "mean_logit", "top1"),
        },
    ),
)


def compile_op(
    mesh: Any,
    implementation: str,
    shape: tuple[int, int, int],
    workspace_bytes: int,
    options: dict[str, Any],
) -> Any:
    """Value and gradient of every input, in bfloat16.

    The vocabulary is sharded over the devices of the mesh, whose only axis is `vocab`.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from dpo_kernels import token_logprobs

    whole, cut = PartitionSpec(), PartitionSpec("vocab")
    bias, num_valid = options.get("bias", False), options.get("num_valid", False)
    static = {k: v for k, v in options.items() if k not in ("bias", "num_valid")}
    parallel = mesh.size > 1

    def local(hidden, head, bias_v, targets, valid):
        return token_logprobs(
            hidden,
            head,
            targets,
            bias=bias_v if bias else None,
            num_valid=valid if num_valid else None,
            axis_name="vocab" if parallel else None,
            workspace_bytes=workspace_bytes,
            implementation=implementation,
            **static,
        )

    def loss(hidden, head, bias_v, targets, valid, dlogprob):
        op = local
        if parallel:
            specs = (whole, cut, cut, whole, whole)
            op = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=whole)
        out = op(hidden, head, bias_v, targets, valid)
        return (out.logprob * dlogprob).sum(), out

    def array(spec: Any, dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    T, D, V = shape
    with jax.set_mesh(mesh):
        arguments = (0, 1, 2) if bias else (0, 1)
        value_and_grad = jax.jit(jax.value_and_grad(loss, arguments, has_aux=True))
        return value_and_grad.lower(
            array(whole, jnp.bfloat16, T, D),
            array(cut, jnp.bfloat16, V, D),
            array(cut, jnp.float32, V),
            array(whole, jnp.int32, T),
            array(whole, jnp.int32),
            array(whole, jnp.float32, T),
        ).compile()
