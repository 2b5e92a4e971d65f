"""One row per loss: what the contract needs to know of it. A new loss is a new row."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import losses_twin as twin
import numpy as np

from raft_jax import losses

B, T, D, D2, V, K = 2, 5, 4, 3, 24, 6


@dataclass(frozen=True)
class Row:
    name: str
    loss: Callable  # (student arrays, fixed arrays) -> nats_BT
    twin: Callable  # the same, in float64 NumPy
    linear: bool  # student arrays: (hidden_BTD, unembedding_DV), else (logits_BTV,)
    distils: bool  # fixed arrays: the teacher's, of the same kind; else (labels_BT,)
    of_logits: Callable | None = None  # the logits variant of a linear loss

    def student(self, seed=0):
        random = np.random.default_rng(seed)
        if not self.linear:
            return (random.normal(size=(B, T, V)).astype(np.float32) * 2,)
        return random.normal(size=(B, T, D)).astype(np.float32), random.normal(size=(D, V)).astype(np.float32)

    def fixed(self, seed=1):
        random = np.random.default_rng(seed)
        if not self.distils:
            return (random.integers(0, V, (B, T)),)
        if not self.linear:
            return (random.normal(size=(B, T, V)).astype(np.float32) * 2,)
        return random.normal(size=(B, T, D2)).astype(np.float32), random.normal(size=(D2, V)).astype(np.float32)


def on_logits(loss, **settings):
    return lambda student, fixed: loss(*student, *fixed, **settings)


def on_hidden(loss, chunk_size, **settings):
    return lambda student, fixed: loss(*student, *fixed, chunk_size=chunk_size, **settings)


def twin_on_hidden(function, distils, **settings):
    def nats(student, fixed):
        return function(twin.logits(*student), twin.logits(*fixed) if distils else fixed[0], **settings)

    return nats


def logits_of_hidden(loss, distils, **settings):
    def nats(student, fixed):
        return loss(jnp.matmul(*student), jnp.matmul(*fixed) if distils else fixed[0], **settings)

    return nats


def table():
    truncated = {"k": K, "temperature": 1.5}
    kinds = [  # name, logits variant, linear variant, twin, settings, distils
        ("cross_entropy", losses.cross_entropy, losses.linear_cross_entropy, twin.cross_entropy, {}, False),
        ("top_k", losses.top_k_forward_kl, losses.linear_top_k_forward_kl, twin.top_k_forward_kl, truncated, True),
        ("top_all", losses.top_k_forward_kl, losses.linear_top_k_forward_kl, twin.top_k_forward_kl,
         {"k": 10 * V, "temperature": 0.7}, True),
        ("forward_kl", losses.forward_kl, losses.linear_forward_kl, twin.forward_kl, {}, True),
        ("reverse_kl", losses.reverse_kl, losses.linear_reverse_kl, twin.reverse_kl, {"temperature": 2.0}, True),
        ("jensen_shannon", losses.jensen_shannon, losses.linear_jensen_shannon, twin.jensen_shannon,
         {"beta": 0.3, "temperature": 1.0}, True),
    ]  # fmt: skip
    rows = []
    for name, of_logits, of_hidden, of_twin, settings, distils in kinds:
        rows.append(Row(name, on_logits(of_logits, **settings), on_logits(of_twin, **settings), False, distils))
        shards = [("", 1)] if name != "top_k" else [("", 1), ("-in-shards", 4)]
        for suffix, vocab_shards in shards:
            rows.append(
                Row(
                    f"linear_{name}{suffix}",
                    on_hidden(of_hidden, 3, vocab_shards=vocab_shards, **settings),
                    twin_on_hidden(of_twin, distils, **settings),
                    True,
                    distils,
                    logits_of_hidden(of_logits, distils, **settings),
                )
            )
    return rows


ROWS = table()
MEANS = {"sequence_mean": losses.sequence_mean, "token_mean": losses.token_mean}
