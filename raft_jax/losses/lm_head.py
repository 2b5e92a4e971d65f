"""The unembedding as it is stored, tied or not; its logits, and the matrix products of its backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import checks, xla_cpu
from raft_jax.losses.sharding import VocabSharding


class TiedEmbedding(NamedTuple):
    """An embedding table [V, D] used as unembedding. Pass it as `unembedding_DV`; its gradient has the same structure.

    Gives the same numbers as `embedding_VD.T`, but without the transposed copy of the table that a loop over chunks
    would need.

    >>> hidden_BTD, embedding_VD = jnp.ones((1, 1, 2)), jnp.zeros((4, 2))
    >>> loss_BT = linear_cross_entropy(hidden_BTD, TiedEmbedding(embedding_VD), jnp.array([[3]]))
    >>> round(float(loss_BT[0, 0]), 4)  # log 4
    1.3863
    """

    embedding_VD: jax.Array


class LogitConfig(NamedTuple):
    """Static settings: logits = softcap tanh(scale (h W + bias) / softcap) in the first vocab_size columns."""

    scale: float
    softcap: float | None
    vocab_size: int
    padded: bool  # whether there are columns beyond vocab_size
    sharding: VocabSharding

    def derivative(self, logits: jax.Array) -> jax.Array | float:
        """d logits / d (h W + bias), computed from the logits."""
        if self.softcap is None:
            return self.scale
        inside = jnp.where(jnp.isneginf(logits), 0, logits / self.softcap)
        return self.scale * (1 - inside**2)


class LMHead(NamedTuple):
    """The arrays of the LM head; `LogitConfig` has its static settings."""

    unembedding: jax.Array | TiedEmbedding
    bias_V: jax.Array | None

    @classmethod
    def checked(cls, who: str, hidden: jax.Array, unembedding: jax.Array | TiedEmbedding, bias_V) -> LMHead:
        """Raises ValueError unless the shapes match. `who` is the argument's prefix: "student_", "teacher_" or ""."""
        head, width = cls(unembedding, bias_V), hidden.shape[-1]
        name, want, advice = (
            (f"TiedEmbedding({who}embedding_VD)", f"[V, {width}]", "without TiedEmbedding it is [D, V]")
            if head.tied
            else (f"{who}unembedding_DV", f"[{width}, V]", "pass an embedding table [V, D] as TiedEmbedding(table)")
        )
        checks.floating(name, head.matrix, 2)
        if head.matrix.shape[1 if head.tied else 0] != width:
            raise ValueError(
                f"{name} must have shape {want} to meet {who}hidden_BTD, got {head.matrix.shape}; {advice}"
            )
        if bias_V is not None:
            checks.floating(f"{who}bias_V", bias_V, 1)
            if bias_V.shape != (head.vocabulary,):
                raise ValueError(
                    f"{who}bias_V must have shape [{head.vocabulary}] like the unembedding, got {bias_V.shape}"
                )
        return head

    @property
    def tied(self) -> bool:
        return isinstance(self.unembedding, TiedEmbedding)

    @property
    def matrix(self) -> jax.Array:
        """[V, D] where tied, else [D, V]."""
        return self.unembedding.embedding_VD if isinstance(self.unembedding, TiedEmbedding) else self.unembedding

    @property
    def dtype(self):
        return self.matrix.dtype

    @property
    def vocabulary(self) -> int:
        return self.matrix.shape[0 if self.tied else 1]

    @property
    def axes(self) -> LMHead:
        """The vocabulary's axis in each array, as a pytree of the same structure."""
        first: Any = 0  # an int where the type says an array, for `jax.tree.map` with the head
        return LMHead(TiedEmbedding(first) if self.tied else first + 1, None if self.bias_V is None else first)

    def config(self, scale, softcap, vocab_size: int, vocab_shards) -> LogitConfig:
        sharding = VocabSharding.of(vocab_shards, self.matrix, 0 if self.tied else 1)
        scale, softcap = checks.logit_scale(scale), checks.softcap(softcap)
        return LogitConfig(scale, softcap, vocab_size, vocab_size < self.vocabulary, sharding)

    def logits(self, hidden_ND: jax.Array, config: LogitConfig, columns_M: jax.Array | None = None) -> jax.Array:
        """[N, V]; or [N, M] if the head has been sliced to the columns M of the vocabulary."""
        dtype = checks.compute_dtype(hidden_ND.dtype, self.dtype)
        accumulated = checks.accumulation_dtype(dtype)
        factors = hidden_ND.astype(dtype), self.matrix.astype(dtype)
        logits = jnp.einsum("nd,vd->nv" if self.tied else "nd,dv->nv", *factors, preferred_element_type=accumulated)
        if self.bias_V is not None:
            logits = logits + self.bias_V.astype(accumulated)[None]
        logits = config.sharding.constrain(logits * config.scale)
        if config.softcap is not None:
            logits = config.softcap * jnp.tanh(logits / config.softcap)
        return jnp.where(self._real(config, columns_M), logits, -jnp.inf) if config.padded else logits

    def gradient(self, hidden_ND: jax.Array, dlogits_NV: jax.Array, dtype, config: LogitConfig) -> LMHead:
        """The head's gradient, from the gradient with respect to h W + bias."""
        rounded_NV = dlogits_NV.astype(gradient_dtype(hidden_ND, self))
        factors = (rounded_NV, hidden_ND) if self.tied else (hidden_ND, rounded_NV)
        matrix = xla_cpu.gradient_product(*factors, dtype, config.sharding.shards)
        matrix = config.sharding.constrain(matrix, 0 if self.tied else 1)
        bias_V = None if self.bias_V is None else dlogits_NV.sum(0).astype(dtype)
        return LMHead(TiedEmbedding(matrix) if self.tied else matrix, bias_V)

    def hidden_gradient(
        self, dlogits_NV: jax.Array, config: LogitConfig, columns_M=None, *, like: jax.Array
    ) -> jax.Array:
        """The hidden states' gradient [N, D] in the accumulation dtype, from the gradient with respect to h W + bias.

        `like` has the dtype of the hidden states.
        """
        rounded_NV = dlogits_NV.astype(gradient_dtype(like, self))
        matrix = self.matrix
        if config.padded:  # padding columns may hold NaN, and 0 * NaN is NaN
            real = self._real(config, columns_M)
            matrix = jnp.where(real.T if self.tied else real, matrix, 0)
        dtype = checks.compute_dtype(rounded_NV.dtype, matrix.dtype)
        factors, accumulated = (rounded_NV.astype(dtype), matrix.astype(dtype)), checks.accumulation_dtype(dtype)
        return jnp.einsum("nv,vd->nd" if self.tied else "nv,dv->nd", *factors, preferred_element_type=accumulated)

    def _real(self, config: LogitConfig, columns_M: jax.Array | None) -> jax.Array:
        """Mask [1, M] of the columns that are not padding."""
        columns_M = jnp.arange(self.vocabulary) if columns_M is None else columns_M
        return columns_M[None] < config.vocab_size


def gradient_dtype(hidden: jax.Array, head: LMHead):
    """The dtype of the logits' gradient in matrix products: the compute dtype.

    float32 in place of float16, in which the small gradients of a mean would underflow.
    """
    dtype = checks.compute_dtype(hidden.dtype, head.dtype)
    return checks.accumulation_dtype(dtype) if dtype == jnp.float16 else dtype


def pair(name: str, value):
    """(student's, teacher's) from a pair, or from one value for both."""
    if isinstance(value, tuple) and len(value) != 2:
        raise ValueError(f"{name} must be one value for both models or a (student's, teacher's), got {value}")
    return value if isinstance(value, tuple) else (value, value)
