"""A model as lm-evaluation-harness asks it: likelihoods by our Scorer, texts by our Sampler."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.errors import InputError, MissingExtra
from raft_jax.losses import linear_cross_entropy
from raft_jax.models import Model
from raft_jax.progress import progress
from raft_jax.sampling import Sampler, Scorer, answer_hidden, answer_means
from raft_jax.sharding import mesh_axes
from raft_jax.tokens import Tokens

NEW_TOKENS = 256  # of a text, where a task does not say how many
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_length")


def require_eval() -> None:
    """Raises MissingExtra if lm-evaluation-harness is not installed."""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtra("lm_eval is not installed; evaluate.tasks needs: pip install 'raft-jax[eval]'")


def make_scored(model: Model):
    """Builds `scored(params, prompt, answer) -> values_B`: the mean nll of each answer, with a minus sign where another
    token than the answer's is the most likely at some place.

    Both are one float32 because `Scorer.over_pairs` takes one value for each pair. The unembedding is applied to one
    position at a time, so that logits of all positions are never held at once.
    """

    @model.jit
    def scored(params, prompt: Tokens, answer: Tokens) -> jax.Array:
        hidden_BAD = answer_hidden(model, params, prompt, answer)
        unembedding = model.unembedding(params)
        nll_BA: Any = linear_cross_entropy(
            hidden_BAD, unembedding, answer.ids, vocab_shards=mesh_axes("vocabulary"), **model.head_settings
        )

        def best_B(hidden_BD):
            return jnp.argmax(model.logits(hidden_BD, unembedding), axis=-1)

        best_BA = jax.lax.map(best_B, hidden_BAD.swapaxes(0, 1)).swapaxes(0, 1)
        greedy_B = jnp.all((best_BA == answer.ids) | ~answer.real.astype(bool), axis=1)
        return jnp.copysign(jnp.maximum(answer_means(nll_BA, answer.real), 0), jnp.where(greedy_B, 1.0, -1.0))

    return scored


class HarnessModel:
    """What the harness asks of a model, but for what its own class of models does; see `make_lm`."""

    def __init__(self, model: Model, params, name: str, batch_size: int, mesh: jax.sharding.Mesh | None, seed: int):
        super().__init__()
        self.tokenizer = model.tokenizer.wrapped
        self._ours, self._params, self._name, self._seed = model.tokenizer, params, name, seed
        self._limit = model.config.max_positions
        self._sampler, self._scorer = Sampler(model, batch_size, mesh, shrink=True), Scorer(model, batch_size, mesh)
        self._scored = make_scored(model)

    @property
    def eot_token_id(self) -> int:
        return self._ours.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self._ours.eos_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self._limit

    @property
    def tokenizer_name(self) -> str:
        return self._ours.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, split_special_tokens=False, **how)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True, **_) -> str:
        if add_generation_prompt:
            return self._ours.render(chat_history)
        *before, last = chat_history  # an answer that is begun, and goes on
        return self._ours.render(before) + last["content"]

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        pairs = [_fitted(context, continuation, self._limit) for _, context, continuation in requests]
        if not pairs:
            return []
        prompts, answers = map(list, zip(*pairs, strict=True))
        with progress(f"{self._name} likelihoods", len(pairs), "texts") as bar:
            scored = partial(self._scored, self._params)
            values = self._scorer.over_pairs(scored, prompts, answers, bar.advance)
        sums = -np.abs(values.astype(np.float64)) * [len(answer) for answer in answers]
        return [(float(total), not sign) for total, sign in zip(sums, np.signbit(values), strict=True)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        from lm_eval import utils  # pyright: ignore[reportMissingImports]

        windows = []
        for number, request in enumerate(requests):
            parts = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self._limit, context_len=1
            )
            windows += [(number, *utils.make_disjoint_window(part)) for part in parts]
        sums = [0.0] * len(requests)
        for (number, *_), (logprob, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += logprob
        return sums

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        texts = [""] * len(requests)
        alike: dict[tuple[int, float, float], list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(_sampling(request.args[1]), []).append(index)
        for (length, temperature, top_p), indices in alike.items():
            if length >= self._limit:
                raise InputError(
                    f"evaluate.tasks: a task asks for {length} new tokens, and the model has {self._limit} positions; "
                    "lower evaluate.task_new_tokens"
                )
            prompts = [self.tok_encode(requests[index].args[0])[length - self._limit :] for index in indices]
            with progress(f"{self._name} answers", len(prompts), "answers") as bar:
                completions = self._sampler.generate(
                    self._params,
                    [prompt or [self.prefix_token_id] for prompt in prompts],
                    key=jax.random.key(self._seed),
                    temperature=temperature,
                    top_p=top_p,
                    max_new_tokens=length,
                    on_batch=lambda batch, _, bar=bar: bar.advance(len(batch)),
                )
            for index, completion in zip(indices, completions, strict=True):
                texts[index] = _cut(self._ours.decode(completion.tokens), requests[index].args[1].get("until"))
        return texts


def make_lm(
    model: Model,
    params,
    *,
    name: str = "",
    batch_size: int = 32,
    mesh: jax.sharding.Mesh | None = None,
    seed: int = 0,
) -> Any:
    """A model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=…)`.

    Texts are encoded as transformers does, special tokens in them included: the harness renders chat templates to text.
    A context that is too long loses its beginning, as with the harness's own models.

    Args:
      model: the model.
      params: its parameters.
      name: for progress lines.
      batch_size: prompts computed at once.
      mesh: of the parameters.
      seed: of texts that a task samples at a temperature; others are greedy.

    Raises:
      MissingExtra: lm_eval is not installed.
    """
    require_eval()
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

    class LM(HarnessModel, TemplateLM):
        """Made here, as only here it is known that the harness is installed."""

        def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

    return LM(model, params, name, batch_size, mesh, seed)


def _fitted(context: Sequence[int], continuation: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
    """A pair without the beginning of its context, where it is too long: its last token is predicted, but not read."""
    if len(continuation) > limit:
        raise InputError(
            f"evaluate.tasks: a text of {len(continuation)} tokens is to be scored, and the model has {limit} positions"
        )
    return list(context)[-(limit + 1 - len(continuation)) :], list(continuation)


def _sampling(settings: dict[str, Any]) -> tuple[int, float, float]:
    """Longest text, temperature and top_p that a task asks for."""
    length = next((int(settings[key]) for key in LENGTH_KEYS if settings.get(key) is not None), NEW_TOKENS)
    if not settings.get("do_sample"):
        return length, 0.0, 1.0
    return length, float(settings.get("temperature", 1.0)), float(settings.get("top_p", 1.0))


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of the texts that end it.

    Example:
      >>> _cut("Yes.\\n\\nQ: and", ["Q:", "\\n\\n"])
      'Yes.'
    """
    for end in [until] if isinstance(until, str) else until or ():
        if end:
            text = text.split(end)[0]
    return text
