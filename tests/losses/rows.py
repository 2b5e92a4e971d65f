"""One row per loss: what the contract needs to know of it. A new loss is a new row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import losses_twin as twin
import numpy as np

from raft_jax import losses
from raft_jax.losses import TiedEmbedding, reference, sequence_mean, sequence_weight, token_mean, token_weight

B, T, D, V, K = 2, 5, 4, 24, 6


@dataclass(frozen=True)
class Row:
    name: str
    loss: Callable  # (*student arrays, *fixed arrays) -> nats_BT
    twin: Callable  # (student logits, fixed) -> nats_BT in float64 NumPy; fixed: the teacher's logits, or labels
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

    def nats(self, student, fixed):
        return self.loss(*student, *fixed)

    def means(self, student, fixed, mask):
        """(sequence mean, token mean)"""
        if self.weighted:
            return tuple(self.loss(*student, *fixed, weight_BT=of(mask)) for of in (sequence_weight, token_weight))
        return tuple(of(self.nats(student, fixed), mask) for of in (sequence_mean, token_mean))

    @property
    def reference(self):
        """The same in plain JAX, from logits: raft_jax/losses/reference.py."""
        return REFERENCES[self.twin.func](self.twin.keywords)

    def nats_of_logits(self, student, fixed):
        return self.of_logits(jnp.matmul(*student), jnp.matmul(*fixed) if self.distils else fixed[0])

    def nats_of_twin(self, student, fixed):
        if self.linear:
            student, fixed = (twin.logits(*student),), (twin.logits(*fixed),) if self.distils else fixed
        return self.twin(*student, *fixed)


def tied(loss):
    """Every unembedding [D, V] given as the embedding table [V, D]."""

    def nats(hidden, unembedding, *fixed, **settings):
        fixed = fixed[:1] + tuple(TiedEmbedding(x.T) for x in fixed[1:])
        return loss(hidden, TiedEmbedding(unembedding.T), *fixed, **settings)

    return nats


def kept(loss, search):
    """The teacher as the `TopK` of an earlier pass."""

    def nats(*arrays, **settings):
        half = len(arrays) // 2
        return loss(*arrays[:half], search(*arrays[half:], **settings), **settings)

    return nats


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
    kinds = [  # name, logits variant, linear variant, twin, settings, distils, takes weights
        ("cross_entropy", losses.cross_entropy, losses.linear_cross_entropy, twin.cross_entropy, {}, False, True),
        ("top_k", losses.top_k_forward_kl, losses.linear_top_k_forward_kl, twin.top_k_forward_kl, truncated, True,
         False),
        ("top_all", losses.top_k_forward_kl, losses.linear_top_k_forward_kl, twin.top_k_forward_kl,
         {"k": 10 * V, "temperature": 0.7}, True, False),
        ("kept_top_k", kept(losses.top_k_forward_kl, losses.top_k),
         kept(losses.linear_top_k_forward_kl, losses.linear_top_k), twin.top_k_forward_kl, truncated, True, False),
        ("forward_kl", losses.forward_kl, losses.linear_forward_kl, twin.forward_kl, {}, True, True),
        ("reverse_kl", losses.reverse_kl, losses.linear_reverse_kl, twin.reverse_kl, {"temperature": 2.0}, True, True),
        ("jensen_shannon", losses.jensen_shannon, losses.linear_jensen_shannon, twin.jensen_shannon,
         {"beta": 0.3, "temperature": 1.0}, True, True),
    ]  # fmt: skip
    rows = [
        Row("linear_raft_losses-sft", partial(answers_at_once, chunk_size=4, k=K), partial(twin.cross_entropy),
            losses.cross_entropy, True, False),
        Row("linear_raft_losses-kl", partial(rollouts_at_once, chunk_size=4, **truncated),
            partial(twin.top_k_forward_kl, **truncated), partial(losses.top_k_forward_kl, **truncated), True, True),
    ]  # fmt: skip
    for name, of_logits, of_hidden, of_twin, settings, distils, takes_weights in kinds:
        of_logits, of_twin = partial(of_logits, **settings), partial(of_twin, **settings)
        rows.append(Row(name, of_logits, of_twin, of_logits, False, distils))
        linear = {"": of_hidden}
        if takes_weights or name == "top_k":
            linear["-tied"] = tied(of_hidden)
        for suffix, loss in linear.items():
            loss, weighted = partial(loss, chunk_size=4, **settings), bool(suffix) and takes_weights
            rows.append(Row(f"linear_{name}{suffix}", loss, of_twin, of_logits, True, distils, weighted))
    return rows


REFERENCES = {
    getattr(twin, name): lambda settings, name=name: partial(getattr(reference, name), **settings)
    for name in ("cross_entropy", "top_k_forward_kl", "forward_kl", "reverse_kl", "jensen_shannon")
}
ROWS = table()
