"""Between hidden states and logits: the unembedding as it is stored, and the products with it."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import checks, placement


class Tied(NamedTuple):
    """An embedding table that is the unembedding too: goes where `unembedding_DV` goes, and its gradient comes out.

    The same numbers as from `embedding_VD.T`, which costs a copy of the table wherever a loop over chunks or blocks
    needs it (XLA on CPU keeps arrays row by row).

    >>> hidden_BTD, embedding_VD = jnp.ones((1, 1, 2)), jnp.zeros((4, 2))
    >>> round(float(linear_cross_entropy(hidden_BTD, Tied(embedding_VD), jnp.array([[3]]))[0, 0]), 4)  # log 4
    1.3863
    """

    embedding_VD: jax.Array


class Form(NamedTuple):
    """The numbers: logits = softcap tanh(scale (h W + bias) / softcap) in the first vocab_size columns."""

    scale: float
    softcap: float | None
    vocab_size: int
    padded: bool  # whether there are columns beyond vocab_size
    chunk_size: int
    shards: int  # devices over which the vocabulary is split


class Head(NamedTuple):
    """The arrays."""

    unembedding: jax.Array | Tied
    bias_V: jax.Array | None

    @classmethod
    def checked(cls, who: str, hidden_BTD: jax.Array, unembedding: jax.Array | Tied, bias_V: jax.Array | None) -> Head:
        """ValueError unless the arrays meet; `who` is student_, teacher_ or nothing."""
        head, width = cls(unembedding, bias_V), hidden_BTD.shape[-1]
        name, want, advice = (
            (f"Tied({who}embedding_VD)", f"[V, {width}]", "without Tied it is [D, V]")
            if head.tied
            else (f"{who}unembedding_DV", f"[{width}, V]", "pass an embedding table [V, D] as Tied(table)")
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
        return isinstance(self.unembedding, Tied)

    @property
    def matrix(self) -> jax.Array:
        """[V, D] where tied, else [D, V]."""
        return self.unembedding.embedding_VD if self.tied else self.unembedding

    @property
    def dtype(self):
        return self.matrix.dtype

    @property
    def vocabulary(self) -> int:
        return self.matrix.shape[0 if self.tied else 1]

    @property
    def axes(self) -> Head:
        """Where the vocabulary is in each of the arrays."""
        return Head(Tied(0) if self.tied else 1, None if self.bias_V is None else 0)

    def form(self, scale, softcap, vocab_size: int, chunk_size: int, vocab_shards: int | None) -> Form:
        checks.softcap(softcap)
        checks.chunk_size(chunk_size)
        shards = placement.vocab_shards(vocab_shards, self.matrix, 0 if self.tied else 1)
        return Form(scale, softcap, vocab_size, vocab_size < self.vocabulary, chunk_size, shards)

    def products(self, hidden_ND: jax.Array) -> jax.Array:
        """h W + bias, [N, V]."""
        exact, _ = dtypes(hidden_ND, self)
        indices = "nd,vd->nv" if self.tied else "nd,dv->nv"
        values_NV = jnp.einsum(indices, hidden_ND, self.matrix, preferred_element_type=exact)
        return values_NV if self.bias_V is None else values_NV + self.bias_V.astype(exact)

    def gradient(self, hidden_ND: jax.Array, narrow_NV: jax.Array, slope_NV: jax.Array, dtype, whole: bool) -> Head:
        """The head's cotangent from that of the products: narrow as a factor, wide in the bias's sum.

        whole: the vocabulary is not split over devices.
        """
        exact, _ = dtypes(hidden_ND, self)
        factors = (narrow_NV, hidden_ND) if self.tied else (hidden_ND, narrow_NV)
        product = functools.partial(_gradient, exact, dtype)
        if whole and narrow_NV.dtype.itemsize == 2:
            by_rows = functools.partial(_gradient_by_rows, exact, dtype)
            matrix = jax.lax.platform_dependent(*factors, cpu=by_rows, default=product)
        else:
            matrix = product(*factors)
        bias_V = None if self.bias_V is None else slope_NV.sum(0).astype(dtype)
        return Head(Tied(matrix) if self.tied else matrix, bias_V)

    def hidden_gradient(self, narrow_NV: jax.Array) -> jax.Array:
        """The hidden states' cotangent, wide."""
        exact, _ = dtypes(narrow_NV, self)
        indices = "nv,vd->nd" if self.tied else "nv,dv->nd"
        return jnp.einsum(indices, narrow_NV, self.matrix, preferred_element_type=exact)


def _gradient(exact, dtype, left_NR, right_NC):
    return jnp.einsum("nr,nc->rc", left_NR, right_NC, preferred_element_type=exact).astype(dtype)


def _gradient_by_rows(exact, dtype, left_NR, right_NC):
    """For XLA's CPU backend, which widens 16-bit factors whole unless the left one is summed over its last axis.

    It would undo a transposition in place; of one outside of a loop it makes an array.
    """
    num_rows = left_NR.shape[1]
    num_blocks = math.gcd(num_rows, 8)

    def block(carry, left_RN):
        return carry, jnp.einsum("rn,nc->rc", left_RN, right_NC, preferred_element_type=exact).astype(dtype)

    _, blocks = jax.lax.scan(block, None, left_NR.T.reshape(num_blocks, num_rows // num_blocks, -1))
    return blocks.reshape(num_rows, -1)


def dtypes(hidden_ND: jax.Array, head: Head):
    """What sums are kept in, and the dtype of slopes as factors: float16 has no room for those of a mean."""
    factor = jnp.result_type(hidden_ND, head.matrix)
    exact = jnp.promote_types(factor, jnp.float32)
    return exact, exact if factor == jnp.float16 else factor


def make_logits(hidden_ND: jax.Array, head: Head, form: Form, columns_V: jax.Array | None = None) -> jax.Array:
    """Logits [N, V] of the head's columns, which are the vocabulary's first unless said otherwise."""
    values_NV = head.products(hidden_ND) * form.scale
    if form.softcap is not None:
        values_NV = form.softcap * jnp.tanh(values_NV / form.softcap)
    if form.padded:
        columns_V = jnp.arange(values_NV.shape[-1]) if columns_V is None else columns_V
        values_NV = jnp.where(columns_V < form.vocab_size, values_NV, -jnp.inf)
    return values_NV


def logits_slope(values: jax.Array, form: Form) -> jax.Array | float:
    """d logit / d (h W + bias), from the logit."""
    if form.softcap is None:
        return form.scale
    inside = jnp.where(jnp.isneginf(values), 0, values / form.softcap)
    return form.scale * (1 - inside**2)


def pair(value):
    """(student's, teacher's) from one for both or a pair."""
    if isinstance(value, tuple) and len(value) != 2:
        raise ValueError(f"logit_scale and logit_softcap must be one for both or a (student's, teacher's), got {value}")
    return value if isinstance(value, tuple) else (value, value)
