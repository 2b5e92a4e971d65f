"""The teacher's K most likely tokens: the type that holds them, and the search for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp

from raft_jax.losses import checks, sharding, xla_cpu
from raft_jax.losses.sharding import VocabSharding


@dataclass(frozen=True, eq=False)
class TopK:
    """The K most likely tokens of a teacher: from `top_k`, `linear_top_k`, a file or another process.

    Losses accept it in place of the teacher's logits or hidden states. An entry with index -1 or logit -inf is absent,
    that is, in neither distribution: this pads positions with fewer than K tokens. It is a pytree; the temperature is
    static data. `_asdict()` gives the arguments for `numpy.savez`, and `TopK(**numpy.load(path))` reads the file.

    Args:
        indices_BTK: [B, T, K], int, most likely first; distinct at each position.
        logits_BTK: [B, T, K], float, not divided by the temperature.
        log_normalizer_BT: [B, T], float, log sum_a exp(u_a / temperature) over the vocabulary, for the metrics.
        entropy_BT: [B, T], float, nats, over the whole vocabulary at the temperature, for the metrics.
        temperature: > 0, at which log_normalizer_BT and entropy_BT were computed; None if unknown.

    Raises:
        ValueError: a dtype or shape is invalid, or an index occurs twice at a position. (The values of traced indices
            cannot be checked; under `jit`, construct the TopK outside.)

    >>> teacher = TopK(jnp.array([[[7, 2, -1]]]), jnp.array([[[1.5, 0.5, 0.0]]]))
    >>> round(float(top_k_forward_kl(jnp.zeros((1, 1, 8)), teacher, temperature=1.0)[0, 0]), 4)  # of two tokens
    0.1109
    """

    indices_BTK: jax.Array
    logits_BTK: jax.Array
    log_normalizer_BT: jax.Array | None = None
    entropy_BT: jax.Array | None = None
    temperature: float | None = None

    def __post_init__(self):
        if not hasattr(self.indices_BTK, "dtype") or not jnp.issubdtype(self.indices_BTK.dtype, jnp.integer):
            kind = getattr(self.indices_BTK, "dtype", type(self.indices_BTK).__name__)
            raise ValueError(f"indices_BTK must be an integer array, got {kind}")
        checks.floating("logits_BTK", self.logits_BTK)
        shape = self.logits_BTK.shape
        if self.indices_BTK.shape != shape:
            raise ValueError(f"indices_BTK must have the shape {shape} of logits_BTK, got {self.indices_BTK.shape}")
        for name in ("log_normalizer_BT", "entropy_BT"):
            value = getattr(self, name)
            if value is not None and value.shape != shape[:-1]:
                raise ValueError(f"{name} must have shape {shape[:-1]} to meet logits_BTK, got {value.shape}")
        object.__setattr__(self, "temperature", static_or_none(self.temperature))
        _check_distinct(self.indices_BTK, self.logits_BTK)

    def _asdict(self) -> dict:
        """The fields that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _replace(self, **changes) -> TopK:
        return replace(self, **changes)


def _unflatten(temperature, arrays) -> TopK:
    """Builds a TopK without checks, because JAX also unflattens pytrees with leaves that are not arrays."""
    teacher = object.__new__(TopK)
    for field, value in zip(fields(TopK), (*arrays, temperature), strict=True):
        object.__setattr__(teacher, field.name, value)
    return teacher


jax.tree_util.register_pytree_node(
    TopK, lambda x: ((x.indices_BTK, x.logits_BTK, x.log_normalizer_BT, x.entropy_BT), x.temperature), _unflatten
)


def _check_distinct(indices, logits) -> None:
    if any(checks.is_traced(x) or not hasattr(x, "__array__") for x in (indices, logits)):
        return
    indices = indices.__array__().astype("int64")
    indices[logits.__array__() == -math.inf] = -1
    indices.sort(axis=-1)
    twice = (indices[..., 1:] == indices[..., :-1]) & (indices[..., 1:] >= 0)
    if twice.any():
        raise ValueError(
            f"indices_BTK must be distinct at each position, got {indices[..., 1:][twice][0]} twice; "
            "mark padding by index -1 or logit -inf"
        )


def given_top_k(teacher: TopK, k: int | None, vocab_size: int) -> TopK:
    """A precomputed `TopK`, truncated to its first k entries, with index -1 at all absent entries."""
    kept = teacher.logits_BTK.shape[-1]
    if k is not None and k > kept and kept < vocab_size:
        raise ValueError(f"k must be at most the {kept} tokens that the TopK holds, got {k}")
    indices, logits = teacher.indices_BTK[..., :k], teacher.logits_BTK[..., :k]
    absent = (indices < 0) | jnp.isneginf(logits)
    arrays = jnp.where(absent, -1, indices).astype(jnp.int32), logits, teacher.log_normalizer_BT, teacher.entropy_BT
    return jax.lax.stop_gradient(TopK(*arrays, teacher.temperature))


def check_given(teacher: TopK, shape: tuple[int, ...], temperature, return_metrics: bool) -> None:
    """Requires that a `TopK` has the student's shape and, for metrics, statistics at the loss's temperature."""
    checks.tokens("logits_BTK", teacher.logits_BTK, shape)
    of_statistics = teacher.temperature
    if not return_metrics or of_statistics is None or checks.is_traced(temperature):
        return
    if not math.isclose(of_statistics, float(temperature), rel_tol=1e-6):
        raise ValueError(
            f"return_metrics needs a TopK whose statistics are at the loss's temperature {temperature}, "
            f"got one of {of_statistics}"
        )


def gather(logits: jax.Array, teacher: TopK, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """(student's, teacher's) logits [..., K] at the teacher's tokens, in float32; both -inf at absent entries."""
    indices = teacher.indices_BTK
    student = jnp.take_along_axis(logits, jnp.clip(indices, 0, logits.shape[-1] - 1), axis=-1)
    student, kept = checks.upcast(student), checks.upcast(teacher.logits_BTK)
    student = jnp.where((indices >= vocab_size) & ~jnp.isneginf(kept), jnp.nan, student)  # no token has that index
    return jnp.where(indices < 0, -jnp.inf, student), jnp.where(indices < 0, -jnp.inf, kept)


def mask_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
    """The logits with -inf in padding columns."""
    if logits.shape[-1] == vocab_size:
        return logits
    columns = jnp.arange(logits.shape[-1]).reshape(*[1] * (logits.ndim - 1), -1)
    return jnp.where(columns < vocab_size, logits, -jnp.inf)


def softmax_metrics(logits: jax.Array, temperature) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(largest logit, log normalizer, entropy in nats) of softmax(logits / temperature) over the last axis."""
    best = jnp.max(logits, axis=-1)
    top = jnp.where(jnp.isneginf(best), 0, best)
    shifted = (logits - top[..., None]) / temperature
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    moment = jnp.sum(jnp.where(weights == 0, 0, weights * shifted), axis=-1)
    entropy = jnp.where(total == 0, 0, jnp.log(total) - moment / total)
    return best, jnp.log(total) + top / temperature, entropy


def truncation_metrics(teacher: TopK, student_BTK, teacher_BTK, student_metrics, temperature) -> dict[str, jax.Array]:
    """Metrics of the truncation, each [B, T]. `student_metrics` are the student's `softmax_metrics`.

    The teacher's metrics are included where the `TopK` has the statistics that they need.
    """
    best_BT, normalizer_BT, entropy_BT = student_metrics
    values = {
        "student_mass": _mass(student_BTK / temperature, normalizer_BT),
        "student_entropy": entropy_BT,
        "agreement": (student_BTK[..., 0] >= best_BT).astype(entropy_BT.dtype),
    }
    if teacher.log_normalizer_BT is not None:
        values["teacher_mass"] = _mass(teacher_BTK / temperature, checks.upcast(teacher.log_normalizer_BT))
    if teacher.entropy_BT is not None:
        values["teacher_entropy"] = checks.upcast(teacher.entropy_BT)
    return jax.lax.stop_gradient(values)


def _mass(kept: jax.Array, normalizer_BT: jax.Array) -> jax.Array:
    """Total probability of the kept tokens, from their scaled logits and the log normalizer of the whole vocabulary."""
    top = jnp.max(kept, axis=-1, initial=-jnp.inf)
    top = jnp.where(jnp.isneginf(top), 0, top)
    normalizer_BT = jnp.where(jnp.isneginf(normalizer_BT), 0, normalizer_BT)
    return jnp.sum(jnp.exp(kept - top[..., None]), axis=-1) * jnp.exp(top - normalizer_BT)


def top_k(
    logits_BTV: jax.Array,
    *,
    k: int = 512,
    temperature: float = 1.5,
    vocab_size: int | None = None,
    recall: float | None = None,
    vocab_shards: int | str | Sequence[str] | None = None,
) -> TopK:
    """The K most likely tokens at each position, which losses accept in place of a teacher.

    Args:
        logits_BTV: [B, T, V], or any leading shape; float, not divided by the temperature. No gradient.
        k: number of tokens kept, >= 1; capped at the size of the vocabulary.
        temperature: > 0, for log_normalizer_BT and entropy_BT only; the kept logits are not divided by it.
        vocab_size: columns at or beyond it are padding and get no probability. Default: V.
        recall: expected share of the true top K that `jax.lax.approx_max_k` finds, in (0, 1]. Default: exact top K.
        vocab_shards: mesh axes that the vocabulary is sharded over, or their size (see `linear_cross_entropy`).

    Returns:
        TopK of [B, T, K] and [B, T], logits in float32. No gradient.

    Raises:
        ValueError: an argument is invalid; raised while tracing.

    RAFT (arXiv:2606.00147), Eq. 9.

    >>> top_k(jnp.log(jnp.array([[[0.1, 0.6, 0.3]]])), k=2).indices_BTK.tolist()
    [[[1, 2]]]
    """
    checks.floating("logits_BTV", logits_BTV)
    checks.truncation(k, recall)
    tau = checks.temperature(temperature, checks.accumulation_dtype(logits_BTV.dtype))
    vocab_size = checks.vocab_size(vocab_size, logits_BTV=logits_BTV.shape[-1])
    split = VocabSharding.of(vocab_shards, logits_BTV)

    @sharding.automatic(logits_BTV.ndim - 1)
    def search(logits_BTV, tau):
        logits_BTV = mask_padding(checks.upcast(jax.lax.stop_gradient(logits_BTV)), vocab_size)
        values_BTK, indices_BTK = top_k_sharded(logits_BTV, min(k, vocab_size), recall, split)
        return TopK(indices_BTK, values_BTK, *softmax_metrics(logits_BTV, tau)[1:], static_or_none(temperature))

    return search(logits_BTV, tau)


def static_or_none(temperature) -> float | None:
    """The temperature as a float; None where it is None or traced."""
    return None if temperature is None or checks.is_traced(temperature) else float(temperature)


def top_k_sharded(
    logits: jax.Array, k: int, recall: float | None, sharding: VocabSharding
) -> tuple[jax.Array, jax.Array]:
    """(values, indices) of the k largest along the last axis, largest first; each shard searches its own columns.

    Exact, or by `jax.lax.approx_max_k` with the given recall. If several values tie for the k-th position, the choice
    depends on the backend and on nothing else.
    """
    shards, size = sharding.shards, logits.shape[-1] // sharding.shards
    split = sharding.constrain(logits.reshape(*logits.shape[:-1], shards, size), -2)
    if recall is not None:
        values, indices = jax.lax.approx_max_k(split, min(k, size), recall_target=recall)
    elif shards > 1:
        values, indices = _by_bins(split, min(k, size))
    else:
        values, indices = xla_cpu.on_cpu(lambda x: tuple(jax.lax.top_k(x, k)), lambda x: _by_bins(x, k), split)
    offset = size * jnp.arange(shards, dtype=indices.dtype)
    indices = indices + offset.reshape(*[1] * (logits.ndim - 1), -1, 1)
    indices = indices.reshape(*logits.shape[:-1], shards * indices.shape[-1])
    values = values.reshape(indices.shape)
    return (values, indices) if shards == 1 else _by_sort(values, indices, k)


def _by_bins(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Exact top k for compilers that implement it by sorting: sorts less, in two steps.

    The k largest values are in the k bins with the largest maxima.
    """
    size = values.shape[-1]
    depth = 2 ** max(0, round(math.log2(size / k) / 2))
    if depth == 1:
        return _by_sort(values, _positions(values), k)
    padding = -size % depth
    if padding:
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)], constant_values=-jnp.inf)
    num_bins = (size + padding) // depth
    binned = values.reshape(*values.shape[:-1], depth, num_bins)
    _, bins = _by_sort(binned.max(-2), _positions(binned[..., 0, :]), k)
    # A candidate's position: depth * num_bins values, of which each bin has one in every row.
    position = num_bins * jnp.arange(depth, dtype=bins.dtype)[:, None] + bins[..., None, :]
    candidates = jnp.take_along_axis(binned, bins[..., None, :], axis=-1)
    flat = *bins.shape[:-1], depth * k
    return _by_sort(candidates.reshape(flat), position.reshape(flat), k)


def _positions(values: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)


def _by_sort(values: jax.Array, indices: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest values and their indices, by sorting, which needs no communication between shards on any backend;
    `jax.lax.top_k` does on some."""
    values, indices = jax.lax.sort((-values, indices), num_keys=1, is_stable=True)
    return -values[..., :k], indices[..., :k]
