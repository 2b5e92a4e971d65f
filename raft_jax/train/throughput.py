"""Model FLOPs utilisation (MFU): the operations that a step's tokens need, over what the devices can do in its time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import numpy as np

from raft_jax.accelerators import find_accelerator
from raft_jax.tokens import Batch, Tokens

FORWARD = 2  # operations per weight and token
BACKWARD = 2  # the same, for the gradient of the activations, and again for that of the weights


def peak_of(devices: np.ndarray) -> float | None:
    """Operations per second of all devices of a mesh; None for a kind that is not known, such as a CPU."""
    known = [find_accelerator(device.device_kind) for device in devices.flat]
    return None if None in known else sum(found[1].flops for found in known if found is not None)


def num_weights(params: Mapping[str, jax.Array]) -> int:
    """Weights in matrix products, by the names of a decoder's parameters: no norms and biases, and a table only as the
    unembedding."""
    left_out = {"embedding_VD"} if "unembedding_DV" in params else set()
    return sum(
        math.prod(array.shape)
        for name, array in params.items()
        if name not in left_out and "norm" not in name and "bias" not in name
    )


class Throughput:
    """The MFU of a run's steps; without recomputation, attention's scores and the sampling itself, as is usual."""

    def __init__(
        self, params: Mapping[str, jax.Array], devices: np.ndarray, *, adapters: bool = False, anchors: bool = False
    ):
        """With `adapters`, the weights themselves have no gradient; the adapters are not counted.

        With `anchors`, the base model reads prompts and answers, too.
        """
        self._anchors = anchors
        self._num_weights, self._peak = num_weights(params), peak_of(devices)
        self._trained = FORWARD + BACKWARD * (1 if adapters else 2)

    def metrics(self, batch: Batch, rollout_tokens: float, seconds: float, rollout_seconds: float) -> dict[str, float]:
        """`tokens_per_second` in the losses; where the devices are known `mfu` of the whole step, and `rollout_mfu` and
        `train_mfu` of its parts.

        Args:
          batch: host arrays, without the rollout.
          rollout_tokens: number of sampled tokens; 0 in a step without rollouts.
          seconds, rollout_seconds: of the step, and of the rollout in it.
        """
        prompt, answer, teacher_prompt = map(_count, (batch.prompt, batch.answer, batch.teacher_prompt))
        speed = {"tokens_per_second": (answer + rollout_tokens) / seconds}
        if self._peak is None:
            return speed
        sampled = FORWARD * (prompt + rollout_tokens) if rollout_tokens else 0.0
        trained = self._trained * (prompt + answer + rollout_tokens)
        if self._anchors:
            trained += FORWARD * (prompt + answer)
        if rollout_tokens:
            trained += FORWARD * (teacher_prompt + rollout_tokens)
        whole = self._num_weights / self._peak
        shares = {"mfu": whole * (sampled + trained) / seconds}
        shares["train_mfu"] = whole * trained / (seconds - rollout_seconds)
        return speed | shares | ({"rollout_mfu": whole * sampled / rollout_seconds} if rollout_tokens else {})


def _count(tokens: Tokens) -> int:
    return int(np.count_nonzero(tokens.real))
