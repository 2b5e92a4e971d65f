"""The student: a trained copy of all weights, or adapters on the teacher's weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from raft_jax.config import LoraConfig
from raft_jax.losses import TiedEmbedding
from raft_jax.models import Model, parameter_shardings
from raft_jax.models.lora import adapter_shardings, init_adapters, merge

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Student:
    """Functions that initialise the trained parameters (always float32), and combine them with the teacher's."""

    model: Model
    init: Callable[[Params, jax.Array], Params]  # (teacher_params, key) -> params
    forward_params: Callable[[Params, Params], Params]  # (params, teacher_params) -> parameters of the forward pass
    merged_params: Callable[[Params, Params], Params]  # (params, teacher_params) -> weights of a standalone model
    shardings: dict[str, NamedSharding]

    def unembedding(self, params: Params) -> jax.Array | TiedEmbedding:
        """The unembedding as the losses take it. A tied table is passed as it is, without a transposed copy."""
        tied = self.model.config.tied_embeddings
        return TiedEmbedding(params["embedding_VD"]) if tied else self.model.unembedding(params)


def make_student(model: Model, lora: LoraConfig, mesh: Mesh) -> Student:
    """Makes the student of a teacher.

    Args:
      model: the teacher. If it is not float32, the student's weights are float32 master weights that are cast to its
        dtype in every step.
      lora: with a rank above 0, the student consists of adapters, and student and teacher share one copy of the model.
      mesh: the devices that parameters are sharded over.
    """
    dtype = model.params["final_norm_D"].dtype
    cast = partial(jax.tree.map, lambda array: array.astype(dtype))
    if not lora.rank:
        return Student(
            model,
            lambda teacher, key: jax.tree.map(lambda array: jnp.copy(array.astype(jnp.float32)), teacher),
            lambda params, teacher: cast(params),
            lambda params, teacher: params,
            parameter_shardings(model.config, mesh),
        )
    config = replace(model.config, adapter_scale=lora.alpha / lora.rank)
    return Student(
        replace(model, config=config),
        lambda teacher, key: init_adapters(config, lora.rank, lora.targets, key),
        lambda params, teacher: jax.lax.stop_gradient(teacher) | cast(params),
        lambda params, teacher: merge(teacher, params, config.adapter_scale),
        adapter_shardings(config, lora.rank, lora.targets, mesh),
    )
