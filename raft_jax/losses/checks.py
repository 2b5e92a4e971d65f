"""What the losses refuse, said at trace time: the argument, what it got, what it wants."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp


def widen(values: jax.Array) -> jax.Array:
    """To float32, in which the losses are computed; float64 stays."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def floating(name: str, values: jax.Array, ndim: int) -> None:
    _of_type(name, values, jnp.floating, "a floating-point")
    if values.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {values.shape}")


def tokens(name: str, values: jax.Array, want: tuple[int, ...]) -> None:
    """[B, T] and whatever follows."""
    if values.shape[:2] != want:
        raise ValueError(f"{name} must have shape [{want[0]}, {want[1]}, ...] like the student's, got {values.shape}")


def labels(labels_BT: jax.Array, want: tuple[int, ...]) -> None:
    _of_type("labels_BT", labels_BT, jnp.integer, "an integer")
    if labels_BT.shape != want:
        raise ValueError(f"labels_BT must have shape {want}, got {labels_BT.shape}")


def mask(mask_BT: jax.Array, want: tuple[int, ...] | None = None) -> None:
    _of_type("mask_BT", mask_BT, jnp.bool_, "a bool")
    if want is not None and mask_BT.shape != want:
        raise ValueError(f"mask_BT must have the shape {want} of values_BT, got {mask_BT.shape}")


def weight(weight_BT: jax.Array, want: tuple[int, ...]) -> None:
    floating("weight_BT", weight_BT, 2)
    if weight_BT.shape != want:
        raise ValueError(f"weight_BT must have shape {want}, got {weight_BT.shape}")


def scalar(name: str, value: jax.Array) -> None:
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}; reduce it first (sequence_mean)")


def temperature(value: float) -> None:
    _positive("temperature", value)


def softcap(value: float | None) -> None:
    if value is not None:
        _positive("logit_softcap", value)


def beta(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"beta must be in (0, 1), got {value}; use forward_kl or reverse_kl at the ends")


def chunk_size(value: int) -> None:
    _count("chunk_size", value)


def truncation(k: int, recall: float | None) -> None:
    _count("k", k)
    if recall is not None and not 0 < recall <= 1:
        raise ValueError(f"recall must be in (0, 1] or None for the exact top k, got {recall}")


def top_k(teacher, want: tuple[int, ...]) -> None:
    """A `TopK` that was computed elsewhere."""
    indices, logits = teacher.indices_BTK, teacher.logits_BTK
    _of_type("indices_BTK", indices, jnp.integer, "an integer")
    floating("logits_BTK", logits, 3)
    tokens("logits_BTK", logits, want)
    if indices.shape != logits.shape:
        raise ValueError(f"indices_BTK must have the shape {logits.shape} of logits_BTK, got {indices.shape}")


def vocab_size(value: int | None, **vocabularies: int) -> int:
    """The number of real tokens: as given, or the one width that all share."""
    if value is None:
        if len(set(vocabularies.values())) > 1:
            sizes = ", ".join(f"{name} {size}" for name, size in vocabularies.items())
            raise ValueError(f"vocabularies differ ({sizes}); set vocab_size to the number of tokens that are real")
        return min(vocabularies.values())
    if not 1 <= value <= min(vocabularies.values()):
        raise ValueError(f"vocab_size must be between 1 and {min(vocabularies.values())}, got {value}")
    return value


def _of_type(name: str, values: jax.Array, kind, words: str) -> None:
    if not hasattr(values, "dtype") or not jnp.issubdtype(values.dtype, kind):
        raise ValueError(f"{name} must be {words} array, got {getattr(values, 'dtype', type(values).__name__)}")


def _count(name: str, value: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _positive(name: str, value: float) -> None:
    if not isinstance(value, jax.core.Tracer) and not float(value) > 0:
        raise ValueError(f"{name} must be > 0, got {value}")
