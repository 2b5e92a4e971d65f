"""The short form of a plan, for `raft-jax check`: what is known without compiling anything."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from raft_jax.config import Config
from raft_jax.data.batches import SIDES, TokenRow
from raft_jax.estimate import ADAM_MOMENTS, BYTES, model_size
from raft_jax.methods import Method
from raft_jax.models.config import DecoderConfig
from raft_jax.plan.flops import Flops, RowTokens

GIGA = 1e9


def short_lines(config: Config, decoder: DecoderConfig, method: Method, rows: Sequence[TokenRow]) -> list[str]:
    """Two lines: bytes of each device that training takes throughout, and operations of a step.

    Args:
      config: of the run. An axis of the mesh that takes all devices that are left counts as one.
      decoder: the model.
      method, rows: a method of the run, and what it trains on.
    """
    mesh, size = config.mesh, model_size(decoder, config)
    sharing = max(1, mesh.fsdp) * max(1, mesh.tensor)
    parameters, teacher = 4 * size.num_trained, size.num_parameters * BYTES[config.model.dtype]
    parts = {"parameters": parameters, "teacher": teacher, "optimiser": ADAM_MOMENTS * parameters}
    said = ", ".join(f"{name} {value / sharing / GIGA:.3g} GB" for name, value in parts.items())
    rollout = config.train.rollout.max_new_tokens if method.distils else 0
    row = RowTokens(*(fmean(len(getattr(row, name)) for row in rows) for name in SIDES), rollout)
    flops = Flops(decoder, config.train.lora)
    step = flops.train(row, method, config.model.remat)
    if method.distils:
        step += flops.generate(row.prompt, rollout)
    return [
        f"on each device throughout training: {said}, before activations",
        f"a step of {method.name}: {config.train.batch_size * step:.2e} FLOPs; `raft-jax plan` compiles the programs "
        "and says whether they fit, and what bounds them",
    ]
