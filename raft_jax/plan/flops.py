"""Operations of a run's programs, counted from the model: two for each weight of a matrix and token, and four for each
pair of a query and a key that it sees, per unit of a head's width. Norms, softmax and sampling are not counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from raft_jax.config import LoraConfig
from raft_jax.methods import Method
from raft_jax.models.config import DecoderConfig, parameter_table
from raft_jax.models.lora import adapter_table


class RowTokens(NamedTuple):
    """Numbers of tokens of one row; means may be fractions."""

    prompt: float
    answer: float
    teacher_prompt: float
    rollout: float


def visible(start: float, count: float, window: int | None = None) -> float:
    """The pairs of a query and a key that it sees, of `count` tokens after `start` others; a token sees itself, too.

    Example:
      >>> visible(0, 4), visible(10, 2), visible(0, 4, window=2)
      (10.0, 23.0, 7.0)
    """
    free = count if window is None else min(max(window - start, 0), count)  # tokens that see all before them
    return free * start + free * (free + 1) / 2 + (count - free) * (window or 0)


@dataclass(frozen=True)
class Flops:
    """Operations of one row, on all chips together.

    Attributes:
      decoder: the model.
      lora: with a rank above 0, its matrices have no gradients of their own.
    """

    decoder: DecoderConfig
    lora: LoraConfig = LoraConfig()  # noqa: RUF009  # frozen

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices."""
        table = parameter_table(self.decoder)
        kept = (name for name in table if "_L" in name and "norm" not in name and "bias" not in name)
        return sum(math.prod(table[name].shape) for name in kept)

    @property
    def head_weights(self) -> int:
        """Weights of the unembedding, without the vocabulary's padding."""
        return self.decoder.vocab_size * self.decoder.width

    @property
    def adapter_weights(self) -> int:
        """Weights of the adapters; 0 without any."""
        if not self.lora.rank:
            return 0
        table = adapter_table(self.decoder, self.lora.rank, self.lora.targets)
        return sum(math.prod(info.shape) for info in table.values())

    def attention(self, start: float, count: float) -> float:
        """Scores and mixed values of `count` tokens after `start` others, in all layers, forward."""
        windows = self.decoder.windows or (None,) * self.decoder.num_layers
        pairs = sum(visible(start, count, window) for window in windows)
        return 4 * self.decoder.num_heads * self.decoder.head_width * pairs

    def forward(self, start: float, count: float, predicted: float = 0) -> float:
        """A forward pass of `count` tokens after `start` others, with the logits of `predicted` tokens."""
        return 2 * self.layer_weights * count + self.attention(start, count) + 2 * self.head_weights * predicted

    def generate(self, prompt: float, new_tokens: float) -> float:
        """Prefill, and decoding of new tokens; the last one is not read."""
        return self.forward(0, prompt) + self.forward(prompt, max(new_tokens - 1, 0), new_tokens)

    def train(self, row: RowTokens, method: Method, remat: bool = False) -> float:
        """The train step of a method without its rollout: a forward pass, two of the same size backward (with adapters
        one, and nothing for the frozen weights), with `remat` the layers' forward pass again, and the teacher's."""
        answer = 0 if method.target == "none" else row.answer
        rollout = row.rollout if method.distils else 0
        tokens, predicted = row.prompt + answer + rollout, answer + rollout
        attended = self.attention(0, row.prompt) + sum(self.attention(row.prompt, n) for n in (answer, rollout))
        backward = 1 if self.lora.rank else 2
        total = (1 + remat + backward) * 2 * self.layer_weights * tokens + (3 + remat) * attended
        total += (1 + backward) * 2 * self.head_weights * predicted + (3 + remat) * 2 * self.adapter_weights * tokens
        if method.distils:
            total += self.forward(0, row.teacher_prompt) + self.forward(row.teacher_prompt, rollout, rollout)
        if method.anchors:
            total += self.forward(0, row.prompt) + self.forward(row.prompt, answer, answer)
        return total
