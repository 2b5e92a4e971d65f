"""Argument checks, made while tracing, and dtype rules. An error names the argument, the value and what is allowed."""

from __future__ import annotations

import numbers
from functools import partial

import jax
import jax.numpy as jnp
from jax.core import Tracer


def accumulation_dtype(*dtypes):
    """The dtype of losses and sums: float32, or float64 if an input is float64 and x64 is enabled."""
    enabled = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue] (made when jax is imported)
    return jnp.dtype(jnp.float64 if enabled and any(jnp.dtype(x) == jnp.float64 for x in dtypes) else jnp.float32)


def compute_dtype(*dtypes):
    """The dtype of a product's factors: their own if they share one below 64 bits, else the accumulation dtype."""
    first, *others = map(jnp.dtype, dtypes)
    return first if first.itemsize < 8 and all(x == first for x in others) else accumulation_dtype(*dtypes)


def upcast(values: jax.Array) -> jax.Array:
    return jnp.asarray(values, accumulation_dtype(values.dtype))


def floating(name: str, values: jax.Array, ndim: int | None = None) -> None:
    """Requires a floating-point array with `ndim` dimensions, or with at least one if `ndim` is None."""
    _of_type(name, values, jnp.floating, "a floating-point")
    if ndim is not None and values.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {values.shape}")
    if values.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a scalar")


def tokens(name: str, values: jax.Array, want: tuple[int, ...]) -> None:
    """Requires an array [..., X] with the leading dimensions of the student."""
    if values.shape[:-1] != want:
        shape = "".join(f"{size}, " for size in want)
        raise ValueError(f"{name} must have shape [{shape}...] like the student's, got {values.shape}")


def labels(labels_BT: jax.Array, want: tuple[int, ...]) -> jax.Array:
    """The labels as integers of at least 32 bits: 8 or 16 bits may not hold the size of the vocabulary."""
    _of_type("labels_BT", labels_BT, jnp.integer, "an integer")
    if labels_BT.shape != want:
        raise ValueError(f"labels_BT must have shape {want}, got {labels_BT.shape}")
    return jnp.asarray(labels_BT, jnp.int32 if labels_BT.dtype.itemsize < 4 else None)


def mask(mask_BT: jax.Array, want: tuple[int, ...] | None = None) -> jax.Array:
    """The mask as bool; an integer mask is True where it is not 0."""
    if not hasattr(mask_BT, "dtype") or not (mask_BT.dtype == jnp.bool_ or jnp.issubdtype(mask_BT.dtype, jnp.integer)):
        kind = getattr(mask_BT, "dtype", type(mask_BT).__name__)
        raise ValueError(f"mask_BT must be a bool or integer array, got {kind}")
    if want is not None and mask_BT.shape != want:
        raise ValueError(f"mask_BT must have the shape {want} of values_BT, got {mask_BT.shape}")
    return mask_BT != 0 if mask_BT.dtype != jnp.bool_ else jnp.asarray(mask_BT)


def weight(weight_BT: jax.Array, want: tuple[int, ...]) -> None:
    _of_type("weight_BT", weight_BT, jnp.floating, "a floating-point")
    if weight_BT.shape != want:
        raise ValueError(f"weight_BT must have shape {want}, got {weight_BT.shape}")


def scalar(name: str, value: jax.Array) -> None:
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}; reduce it first (sequence_mean)")


def temperature(value, dtype) -> jax.Array:
    """The temperature as an array. It may be traced; differentiating with respect to it raises an error."""
    if jnp.shape(value) != ():
        raise ValueError(f"temperature must be a scalar, got shape {jnp.shape(value)}")
    if is_traced(value):
        return without_gradient("temperature", value.astype(dtype))
    if not float(value) > 0:
        raise ValueError(f"temperature must be > 0, got {value}")
    return jnp.asarray(value, dtype)


def logit_scale(value) -> float:
    return static("logit_scale", value, "multiply the hidden states (and the bias) by it instead")


def softcap(value) -> float | None:
    if value is None:
        return None
    value = static("logit_softcap", value)
    if not value > 0:
        raise ValueError(f"logit_softcap must be > 0, got {value}")
    return value


def beta(value) -> float:
    value = static("beta", value)
    if not 0 < value < 1:
        raise ValueError(f"beta must be in (0, 1), got {value}; use forward_kl or reverse_kl at the ends")
    return value


def label_smoothing(value) -> float:
    value = static("label_smoothing", value)
    if not 0 <= value < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {value}")
    return value


def z_loss(value) -> float:
    value = static("z_loss", value)
    if not value >= 0:
        raise ValueError(f"z_loss must be >= 0, got {value}")
    return value


def chunk_size(value: int) -> int:
    return count("chunk_size", value)


def truncation(k: int | None, recall: float | None) -> None:
    if k is not None:
        count("k", k)
    if recall is not None and not 0 < static("recall", recall) <= 1:
        raise ValueError(f"recall must be in (0, 1] or None for the exact top k, got {recall}")


def vocab_size(value: int | None, **vocabularies: int) -> int:
    """The number of real tokens: the given value, or the size that all vocabularies share."""
    if value is None:
        if len(set(vocabularies.values())) > 1:
            sizes = ", ".join(f"{name} {size}" for name, size in vocabularies.items())
            raise ValueError(f"vocabularies differ ({sizes}); set vocab_size to the number of tokens that are real")
        return min(vocabularies.values())
    if not 1 <= value <= min(vocabularies.values()):
        raise ValueError(f"vocab_size must be between 1 and {min(vocabularies.values())}, got {value}")
    return value


def is_traced(value) -> bool:
    return isinstance(value, Tracer)


def static(name: str, value, instead: str = "pass a Python number") -> float:
    """The value as a Python float, which becomes a constant of the compiled program."""
    if is_traced(value):
        raise ValueError(f"{name} must be known when the program is traced, got a traced array; {instead}")
    return float(value)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def without_gradient(name: str, value: jax.Array) -> jax.Array:
    """The value. Differentiating with respect to it raises an error that names it; a custom VJP would give 0."""
    return value


@without_gradient.defjvp
def _no_derivative(name, primals, tangents):
    raise ValueError(f"{name} carries no gradient here; pass jax.lax.stop_gradient({name})")


def count(name: str, value: int) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def _of_type(name: str, values: jax.Array, kind, words: str) -> None:
    if not hasattr(values, "dtype") or not jnp.issubdtype(values.dtype, kind):
        raise ValueError(f"{name} must be {words} array, got {getattr(values, 'dtype', type(values).__name__)}")
