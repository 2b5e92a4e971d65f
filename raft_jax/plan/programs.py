"""The programs of a run on a mesh, lowered for shapes of arrays: no weights, and no devices at hand.

Each method must be called under `jax.set_mesh(mesh)`, as a run does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from raft_jax.config import Config
from raft_jax.errors import InputError
from raft_jax.losses import linear_cross_entropy, linear_top_k_forward_kl
from raft_jax.methods import METHODS, Method
from raft_jax.models import Model, parameter_shardings, vocab_padding
from raft_jax.models.attention import best_kernel
from raft_jax.models.config import DecoderConfig, parameter_table
from raft_jax.sampling.decode import Settings, decoding_weights, empty, make_decode
from raft_jax.sampling.engine import unrolls
from raft_jax.sharding import bytes_per_device, mesh_axes, named_sharding, partition_spec, use_mesh
from raft_jax.tokens import Batch, Tokens
from raft_jax.train.loop import jit_train_step, optimizer_of
from raft_jax.train.rollout import SampleRollout
from raft_jax.train.state import TrainState, init_state, state_shardings
from raft_jax.train.student import make_student


class Side(NamedTuple):
    """One part of every row: its padded length, the share of slots that hold real tokens, and how many tokens all rows
    begin with."""

    length: int
    share: float = 1.0
    shared: int = 0


@dataclass(frozen=True)
class Sides:
    """The parts of a training row."""

    prompt: Side
    answer: Side
    teacher_prompt: Side


class Programs:
    """The programs of a config, lowered for shapes of arrays."""

    def __init__(
        self,
        decoder: DecoderConfig,
        config: Config,
        mesh: Mesh,
        sides: Sides,
        batch_size: int | None = None,
        tokenizer=None,
    ):
        """
        Args:
          decoder: as the model's config.json gives it.
          config: of the run.
          mesh: of devices that need not be at hand.
          sides: of training rows.
          batch_size: in place of the config's.
          tokenizer: of the model; None: something with one stop token.

        Raises:
          InputError: the batch or the model does not divide over the mesh.
        """
        self.config, self.mesh, self.sides = config, mesh, sides
        self.batch_size = batch_size or config.train.batch_size
        shards, count = mesh.shape["data"] * mesh.shape["fsdp"], config.train.num_micro_batches
        if self.batch_size % (shards * count):
            raise InputError(
                f"train.batch_size {self.batch_size} in {count} micro-batch(es) does not divide over mesh data×fsdp = "
                f"{shards}; change train.batch_size, train.num_micro_batches or the mesh"
            )
        dtype = jnp.dtype(config.model.dtype)
        with use_mesh(mesh):
            attention = config.model.attention
            kernel = (
                best_kernel(dtype, decoder.attention_softcap, decoder.head_width) if attention == "auto" else attention
            )
        padding = vocab_padding(decoder, mesh)
        decoder = replace(decoder, remat=config.model.remat, kernel=kernel, vocab_padding=padding)
        self.shardings = parameter_shardings(decoder, mesh)
        self.params = {
            key: jax.ShapeDtypeStruct(info.shape, dtype, sharding=self.shardings[key])
            for key, info in parameter_table(decoder).items()
        }
        self.model = Model(decoder, self.params, tokenizer or SimpleNamespace(stop_ids=(1,), pad_id=0))
        self.student = make_student(self.model, config.train.lora, mesh)

    @cached_property
    def state(self) -> TrainState:
        """The state of training."""
        optimizer = optimizer_of(self.config.train, self.config.train.learning_rate)
        state = jax.eval_shape(
            lambda params, key: init_state(self.student.init(params, key), optimizer), self.params, _key()
        )
        layout = state_shardings(state, self.student.shardings)
        return jax.tree.map(lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y), state, layout)

    def cache_bytes(self, num_rows: int, num_slots: int) -> int:
        """Bytes of a cache on one device."""
        config = self.model.config
        shape = (2 * config.num_layers, num_rows, config.num_kv_heads, config.head_width, num_slots)
        axes = (None, "batch", "kv_heads", None, None)
        sharding = named_sharding(self.mesh, axes, shape, "the cache")
        return bytes_per_device(jax.ShapeDtypeStruct(shape, self.params["embedding_VD"].dtype, sharding=sharding))

    @property
    def num_rows(self) -> int:
        """Rows of a batch on one device, in one micro-batch."""
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"] * self.config.train.num_micro_batches
        return self.batch_size // parts

    def step(self, method: Method = METHODS["raft"]):
        """The train step of a method, without its rollout."""
        optimizer = optimizer_of(self.config.train, self.config.train.learning_rate)
        rollout = Side(self.config.train.rollout.max_new_tokens, self.sides.answer.share)
        batch = self._batch()._replace(rollout=self._tokens(rollout) if method.distils else None)
        return jit_train_step(self.student, optimizer, method, self.config.train).lower(self.state, self.params, batch)

    def rollout(self):
        """Prefill and decoding of a batch's rollouts."""
        sample = SampleRollout(self.student, self.config.train, self.mesh.shape["data"] * self.mesh.shape["fsdp"])
        key, temperature = self._drawing()
        *arrays, _ = sample.arguments(self.state.params, self.params, self._batch(), key)
        return sample.sample.lower(*arrays, temperature)

    def decode(self, num_rows: int, prompt: int, num_tokens: int, num_drafts: int = 0):
        """Decoding of new tokens in each of some rows, after prompts of up to `prompt` tokens."""
        decode = make_decode(self.model, Settings(num_tokens, num_drafts=num_drafts))
        unroll = unrolls(self.params, num_tokens)

        def run(params, done_B, key, temperature):
            decoding = empty(self.model, params, num_rows, prompt + num_tokens + num_drafts)._replace(done_B=done_B)
            weights = ()
            if unroll:  # as raft_jax.sampling.engine does
                weights = decoding_weights(self.model, params, num_rows)
                decoding = decoding._replace(cache=decoding.cache.unstacked())
            return decode(params, decoding, key, temperature, num_rows, num_tokens, *weights)

        return self.model.jit(run).lower(self.params, self._array(bool, num_rows), *self._drawing())

    def losses(self):
        """RAFT's two losses and their gradients with respect to hidden states and table, from float32 masters."""
        model, B, T = self.model, self.batch_size, self.config.train.rollout.max_new_tokens
        settings = {"vocab_shards": mesh_axes("vocabulary"), **model.head_settings}
        settings["chunk_size"] = self.config.train.loss_chunk_size or 512
        name = "embedding_VD" if model.config.tied_embeddings else "unembedding_DV"
        table, unembedding = self.params[name], self.student.unembedding
        axes = ("batch", None, None)
        hidden = self._array(table.dtype, B, T, model.config.width, axes=axes)

        def losses(master, teacher_table, answer, student, teacher, labels, weight):
            def total(master, answer, student):
                head = unembedding({name: master.astype(table.dtype)})
                sft = linear_cross_entropy(answer, head, labels, weight_BT=weight, **settings)
                teacher_head = unembedding({name: teacher_table})
                kl, metrics = linear_top_k_forward_kl(
                    student, head, teacher, teacher_head, weight_BT=weight, k=512, return_metrics=True, **settings
                )
                return sft + kl, jax.tree.map(jnp.sum, metrics)

            return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(master, answer, student)

        rows = NamedSharding(self.mesh, partition_spec(axes))
        shardings = ((None, None), (table.sharding, rows, rows))
        master = jax.ShapeDtypeStruct(table.shape, jnp.float32, sharding=table.sharding)
        arrays = (self._array(dtype, B, T) for dtype in (jnp.int32, jnp.float32))
        return jax.jit(losses, out_shardings=shardings).lower(master, table, hidden, hidden, hidden, *arrays)

    def _batch(self) -> Batch:
        sides = self.sides
        prompt, answer, teacher = map(self._tokens, (sides.prompt, sides.answer, sides.teacher_prompt))
        return Batch(prompt, answer, teacher, self._array(jnp.int32, self.batch_size))

    def _tokens(self, side: Side) -> Tokens:
        # Rows begin alike in all models but those whose rope depends on the length; see make_batches.
        shared = 0 if self.model.config.ropes_depend_on_length else side.shared
        capacity = max(1, math.ceil(side.share * self.num_rows * side.length))
        ids, mask = (self._array(dtype, self.batch_size, side.length) for dtype in (jnp.int32, bool))
        return Tokens(ids, mask, capacity, shared)

    def _array(self, dtype, *shape: int, axes=("batch",)) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, partition_spec(axes)))

    def _drawing(self):
        """Key and temperature, which every device has."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return [jax.ShapeDtypeStruct((), dtype, sharding=whole) for dtype in (_key().dtype, jnp.float32)]


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))
