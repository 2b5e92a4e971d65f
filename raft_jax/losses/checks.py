"""What the losses refuse, said at trace time: the argument, what it got, what it wants."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def widen(values: jax.Array) -> jax.Array:
    """To float32, where the losses are computed; float64 stays."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def floating(name: str, values: jax.Array, ndim: int | None = None) -> None:
    if not hasattr(values, "dtype") or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"{name} must be a floating-point array, got {getattr(values, 'dtype', type(values))}")
    if ndim is not None and values.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {values.shape}")


def shape(name: str, values: jax.Array, want: tuple[int, ...], why: str) -> None:
    if values.shape != want:
        raise ValueError(f"{name} must have shape {want} ({why}), got {values.shape}")


def integers(name: str, values: jax.Array) -> None:
    if not hasattr(values, "dtype") or not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"{name} must be an integer array, got {getattr(values, 'dtype', type(values))}")


def mask(values_BT: jax.Array, mask_BT: jax.Array) -> None:
    floating("values_BT", values_BT, 2)
    if getattr(mask_BT, "dtype", None) != jnp.bool_:
        raise ValueError(f"mask_BT must be a bool array, got {getattr(mask_BT, 'dtype', type(mask_BT))}")
    shape("mask_BT", mask_BT, values_BT.shape, "that of values_BT")


def scalar(name: str, value: jax.Array) -> None:
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}; reduce it first (sequence_mean)")


def temperature(value: float) -> None:
    if isinstance(value, (int, float)) and not value > 0:
        raise ValueError(f"temperature must be > 0, got {value}")


def positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def vocab_size(value: int | None, **vocabularies: int) -> int:
    """The number of real tokens: `vocab_size`, or the width that all the logits share."""
    smallest = min(vocabularies.values())
    if value is None:
        if len(set(vocabularies.values())) > 1:
            sizes = ", ".join(f"{name} {size}" for name, size in vocabularies.items())
            raise ValueError(f"vocabularies differ ({sizes}); set vocab_size to the number of real tokens they share")
        return smallest
    if not 1 <= value <= smallest:
        raise ValueError(f"vocab_size must be between 1 and {smallest}, got {value}")
    return value
