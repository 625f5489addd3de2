"""`dpo train`: train on a run file's pairs, evaluate, and save the model."""

from jax.sharding import Mesh

from engine.commands.inputs import prepare_run
from engine.config.run import RunConfig
from engine.models import Decoder, DecoderConfig, load_model
from engine.parallel import processes
from engine.training.continuation import check_continuation
from engine.training.identity import flat
from engine.training.lora import lora_policy, reference_decoder
from engine.training.trainer import Trainer


def load_models(
    run: RunConfig, config: DecoderConfig, mesh: Mesh
) -> tuple[Decoder, Decoder | None]:
    """The policy, and the reference where it is not the policy before training.

    Args:
        config: the policy's, with its adapter.
    """
    adapter, given = config.adapter, run.reference_model
    base = load_model(
        run.model.name_or_path,
        mesh=mesh,
        dtype=run.model.dtype,
        param_dtype=run.model.param_dtype if adapter is None else run.model.dtype,
        remat=run.model.remat,
        reduce_dtype=run.model.reduce_dtype,
        mlp_tile=run.model.mlp_tile,
    )
    model, reference = base, None
    if run.lora is not None and adapter is not None:
        model = lora_policy(
            base,
            run.lora,
            adapter,
            param_dtype=run.model.param_dtype,
            seed=run.trainer.seed,
        )
        reference = base if run.lora.adapter is None else None
    if given is not None:
        reference = reference_decoder(
            model,
            base,
            name=given.name_or_path,
            adapter=given.adapter,
            synced=run.trainer.sync_ref_model,
            dtype=given.dtype,
        )
    return model, reference


def main(run: RunConfig) -> None:
    """Train as a run file says; everything is checked before a weight is loaded."""
    prepared = prepare_run(run)
    config = flat(run)

    def check() -> None:
        check_continuation(prepared, config)

    processes.first_decides(check)
    model, reference = load_models(run, prepared.model, prepared.mesh)
    # The trainer takes the arrays over: `model` is empty from the first step on.
    Trainer(prepared, model, reference, config=config).train()
