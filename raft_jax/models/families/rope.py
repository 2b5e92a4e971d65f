"""Converts the rope settings of a config.json to the frequencies of the rotated pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from raft_jax.errors import InputError
from raft_jax.models.rope import Rope
from raft_jax.terminal import one_line

MOST = float(np.finfo(np.float32).max)
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def plain_frequencies(theta: float, rotary_width: int) -> np.ndarray:
    """theta^(-2j / R) for each pair j, float32, `[R/2]`.

    Example:
      >>> plain_frequencies(10_000.0, 4).tolist()
      [1.0, 0.009999999776482582]
    """
    exponent = np.arange(0, rotary_width, 2, dtype=np.float32) / np.float32(rotary_width)
    return np.float32(1) / np.float32(theta) ** exponent


def plain_rope(theta: float, rotary_width: int) -> Rope:
    """The original RoPE (arXiv:2104.09864)."""
    return Rope(as_tuple(plain_frequencies(theta, rotary_width)))


def no_rope(rotary_width: int) -> Rope:
    """The rope of a layer without position encoding: all frequencies are 0."""
    return Rope((0.0,) * (rotary_width // 2))


def as_tuple(frequencies: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, frequencies))


def make_rope(settings: Mapping[str, Any], rotary_width: int, max_positions: int) -> Rope:
    """The rope for a config.json's settings: `rope_type`, `rope_theta` and the keys of that type.

    Raises:
      InputError: an unknown type (the message lists the known ones), or a key that is missing or not a number.
    """
    kind = settings.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(KINDS)}")
    plain = plain_frequencies(_number(settings, "rope_theta"), rotary_width)
    return KINDS[kind](plain, settings, max_positions)


def llama3_factors(frequencies: np.ndarray, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """Llama 3.1's divisor of each frequency: `factor` for low frequencies, 1 for high ones, blended in between."""
    turns = original * frequencies / np.float32(2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return 1 / (keep + (1 - keep) / np.float32(factor))


def _number(settings: Mapping[str, Any], key: str) -> float:
    value = settings.get(key)
    if value is None:
        raise InputError(f"config.json: rope_type {settings.get('rope_type')!r} needs the key {key} in rope_parameters")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MOST:
        raise InputError(f"config.json: the rope's {key} must be a number above 0, got {one_line(repr(value), 60)}")
    return float(value)


def _default(plain: np.ndarray, settings: Mapping[str, Any], max_positions: int) -> Rope:
    return Rope(as_tuple(plain))


def _linear(plain: np.ndarray, settings: Mapping[str, Any], max_positions: int) -> Rope:
    return Rope(as_tuple(plain / np.float32(_number(settings, "factor"))))


def _llama3(plain: np.ndarray, settings: Mapping[str, Any], max_positions: int) -> Rope:
    settings = {"original_max_position_embeddings": max_positions, **settings}
    factor, low, high, original = (_number(settings, key) for key in LLAMA3_KEYS)
    if low >= high:
        raise InputError(f"config.json: the rope's low_freq_factor {low} must be below its high_freq_factor {high}")
    return Rope(as_tuple(plain / llama3_factors(plain, factor, low, high, original)))


def _longrope(plain: np.ndarray, settings: Mapping[str, Any], max_positions: int) -> Rope:
    """LongRoPE (arXiv:2402.13753): one list of divisors up to the length of pretraining, another beyond it."""
    original = _number(
        {"original_max_position_embeddings": max_positions, **settings}, "original_max_position_embeddings"
    )
    factor = max_positions / original if settings.get("factor") is None else _number(settings, "factor")
    if settings.get("attention_factor") is not None:
        scale = _number(settings, "attention_factor")
    else:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(
        as_tuple(plain / _divisors(settings, "short_factor", len(plain))),
        as_tuple(plain / _divisors(settings, "long_factor", len(plain))),
        int(original),
        scale,
    )


def _divisors(settings: Mapping[str, Any], key: str, size: int) -> np.ndarray:
    try:
        divisors = np.asarray(settings.get(key), np.float32)
    except (TypeError, ValueError):
        divisors = np.zeros(0, np.float32)
    if divisors.shape != (size,) or not (np.isfinite(divisors) & (divisors > 0)).all():
        raise InputError(
            f"config.json: the rope's {key} must be a list of {size} numbers above 0 (half the width that is turned)"
        )
    return divisors


KINDS = {"default": _default, "linear": _linear, "llama3": _llama3, "longrope": _longrope}
