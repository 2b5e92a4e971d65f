"""One row per loss: what the contract needs to know of it. A new loss is a new row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import in_float64
import jax.numpy as jnp
import numpy as np

from raft_jax import losses
from raft_jax.losses import TiedEmbedding, reference, sequence_mean, sequence_weight, token_mean, token_weight

B, T, D, V, K = 2, 5, 4, 24, 6


@dataclass(frozen=True)
class Row:
    name: str
    loss: Callable  # (*student arrays, *fixed arrays) -> loss_BT
    in_numpy: Callable  # (student logits, fixed) -> loss_BT in float64 NumPy; fixed: the teacher's logits, or labels
    of_logits: Callable  # the same in JAX, from logits
    linear: bool  # student arrays: (hidden_BTD, unembedding_DV), else (logits_BTV,)
    distils: bool  # fixed arrays: the teacher's, of the same kind; else (labels_BT,)
    weighted: bool = False  # a linear loss that takes weight_BT: its means are its weighted sums

    def arrays(self, seed, batch=B, time=T, width=D, vocabulary=V):
        random = np.random.default_rng(seed)
        if not self.linear:
            return (random.normal(size=(batch, time, vocabulary)).astype(np.float32) * 2,)
        sizes = (batch, time, width), (width, vocabulary)
        return tuple(random.normal(size=size).astype(np.float32) for size in sizes)

    def student(self, seed=0, **sizes):
        return self.arrays(seed, **sizes)

    def fixed(self, seed=1, batch=B, time=T, vocabulary=V, **sizes):
        if self.distils:
            return self.arrays(seed, batch, time, vocabulary=vocabulary, **sizes)
        return (np.random.default_rng(seed).integers(0, vocabulary, (batch, time)),)

    def unreduced(self, student, fixed):
        return self.loss(*student, *fixed)

    def means(self, student, fixed, mask):
        """(sequence mean, token mean)"""
        if self.weighted:
            return tuple(self.loss(*student, *fixed, weight_BT=of(mask)) for of in (sequence_weight, token_weight))
        return tuple(of(self.unreduced(student, fixed), mask) for of in (sequence_mean, token_mean))

    @property
    def reference(self):
        """The same in plain JAX, from logits: raft_jax/losses/reference.py."""
        return REFERENCES[self.in_numpy.func](self.in_numpy.keywords)

    def losses_of_logits(self, student, fixed):
        return self.of_logits(jnp.matmul(*student), jnp.matmul(*fixed) if self.distils else fixed[0])

    def losses_in_numpy(self, student, fixed):
        if self.linear:
            student, fixed = (in_float64.logits(*student),), (in_float64.logits(*fixed),) if self.distils else fixed
        return self.in_numpy(*student, *fixed)


def tied(loss):
    """Every unembedding [D, V] given as the embedding table [V, D]."""

    def unreduced(hidden, unembedding, *fixed, **settings):
        fixed = fixed[:1] + tuple(TiedEmbedding(x.T) for x in fixed[1:])
        return loss(hidden, TiedEmbedding(unembedding.T), *fixed, **settings)

    return unreduced


def kept(loss, search):
    """The teacher as the `TopK` of an earlier pass."""

    def unreduced(*arrays, **settings):
        half = len(arrays) // 2
        return loss(*arrays[:half], search(*arrays[half:], **settings), **settings)

    return unreduced


def answers_at_once(hidden, unembedding, labels, **settings):
    """`linear_raft_losses` for its cross entropy; the rollouts are of a student that is its teacher."""
    others = jnp.ones_like(hidden)
    return losses.linear_raft_losses(hidden, labels, others, unembedding, others, unembedding, **settings)[0]


def rollouts_at_once(hidden, unembedding, *teacher, **settings):
    """`linear_raft_losses` for its KL; no answer has a label."""
    others, labels = jnp.ones_like(hidden), jnp.full(hidden.shape[:-1], -1)
    return losses.linear_raft_losses(others, labels, hidden, unembedding, *teacher, **settings)[1]


def table():
    truncated = {"k": K, "temperature": 1.5}
    kinds = [  # name, logits variant, linear variant, float64, settings, distils, takes weights
        ("cross_entropy", losses.cross_entropy, losses.linear_cross_entropy, in_float64.cross_entropy, {}, False, True),
        ("top_k", losses.top_k_forward_kl, losses.linear_top_k_forward_kl, in_float64.top_k_forward_kl, truncated, True,
         True),
        ("top_all", losses.top_k_forward_kl, losses.linear_top_k_forward_kl, in_float64.top_k_forward_kl,
         {"k": 10 * V, "temperature": 0.7}, True, False),
        ("kept_top_k", kept(losses.top_k_forward_kl, losses.top_k),
         kept(losses.linear_top_k_forward_kl, losses.linear_top_k), in_float64.top_k_forward_kl, truncated, True,
         False),
        ("forward_kl", losses.forward_kl, losses.linear_forward_kl, in_float64.forward_kl, {}, True, True),
        ("reverse_kl", losses.reverse_kl, losses.linear_reverse_kl, in_float64.reverse_kl, {"temperature": 2.0}, True,
         True),
        ("jensen_shannon", losses.jensen_shannon, losses.linear_jensen_shannon, in_float64.jensen_shannon,
         {"beta": 0.3, "temperature": 1.0}, True, True),
    ]  # fmt: skip
    rows = [
        Row("linear_raft_losses-sft", partial(answers_at_once, chunk_size=4, k=K), partial(in_float64.cross_entropy),
            losses.cross_entropy, True, False),
        Row("linear_raft_losses-kl", partial(rollouts_at_once, chunk_size=4, **truncated),
            partial(in_float64.top_k_forward_kl, **truncated), partial(losses.top_k_forward_kl, **truncated), True,
            True),
    ]  # fmt: skip
    for name, of_logits, of_hidden, in_numpy, settings, distils, takes_weights in kinds:
        of_logits, in_numpy = partial(of_logits, **settings), partial(in_numpy, **settings)
        rows.append(Row(name, of_logits, in_numpy, of_logits, False, distils))
        linear = {"": of_hidden}
        if takes_weights:
            linear["-tied"] = tied(of_hidden)
        if name == "top_k":  # its two backward passes differ most: with and without a tied table
            linear["-weighted"] = of_hidden
        for suffix, loss in linear.items():
            weighted = takes_weights and suffix == ("-weighted" if name == "top_k" else "-tied")
            loss = partial(loss, chunk_size=4, **settings)
            rows.append(Row(f"linear_{name}{suffix}", loss, in_numpy, of_logits, True, distils, weighted))
    return rows


REFERENCES = {
    getattr(in_float64, name): lambda settings, name=name: partial(getattr(reference, name), **settings)
    for name in ("cross_entropy", "top_k_forward_kl", "forward_kl", "reverse_kl", "jensen_shannon")
}
ROWS = table()
