"""Models in JAX: `load_pretrained` returns a config, parameters, a tokenizer and pure functions of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from raft_jax.errors import InputError, require_train

require_train("flax", "jinja2", "safetensors", "tokenizers", "transformers")

from raft_jax.models.attention import KERNELS, best_kernel, softcap, why_not_cudnn
from raft_jax.models.config import DecoderConfig, parameter_table
from raft_jax.models.decoder import Cache, Decoder
from raft_jax.models.tokenizer import Tokenizer, tokenizer_of
from raft_jax.models.weights import config_of, head_differs, load_parameters, open_weights
from raft_jax.models.xla_cpu import Tiled, compiler_options, product
from raft_jax.sharding import LOGICAL_TO_MESH, named_sharding
from raft_jax.sources import resolve
from raft_jax.tokens import Tokens, concatenate

__all__ = ["DecoderConfig", "Model", "Tokenizer", "load_pretrained", "parameter_shardings"]


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder's config, its parameters and its tokenizer. The functions are pure: parameters come first.

    `params` is a plain dict of arrays, one per row of `parameter_table(config)`: the pytree that optax, Orbax and
    `jax.grad` see. Each function wraps it in the NNX module.
    """

    config: DecoderConfig
    params: dict[str, jax.Array]
    tokenizer: Tokenizer = None  # pyright: ignore[reportAssignmentType]  # None where no text is rendered
    hf_config: dict[str, Any] | None = None
    source: str = ""  # the source it was loaded from
    generation: dict[str, Any] | None = None  # contents of generation_config.json
    with_vision: bool = False  # the decoder of a vision-language model; the vision part is not loaded

    def jit(self, function: Callable, **settings) -> Any:
        """`jax.jit(function, **settings)` with the compiler's options for weights like the model's.

        Call it under the mesh that the function runs on. Other jitted functions cannot call the result.
        """
        return jax.jit(function, compiler_options=compiler_options(self.params), **settings)

    def hidden(self, params, tokens: Tokens, positions_BT=None, branches=None) -> jax.Array:
        """Final hidden states `[B, T, D]`; see Decoder.hidden."""
        return Decoder(self.config, params).hidden(tokens, positions_BT, branches)

    def completion_hidden(self, params, prompt: Tokens, *completions: Tokens) -> list[jax.Array]:
        """Hidden states from which each token of a completion is predicted, `[B, C, D]` for each completion.

        Takes one or two completions. Each follows the prompt, which is computed once for both. A single completion is
        rounded like the second of two, so that a teacher with the student's weights gives exactly the student's values.
        """
        first = completions[0].length if len(completions) == 2 else 0
        begin = prompt.length
        hidden_BTD = self.hidden(params, concatenate(prompt, *completions), branches=(begin, first))
        last_BCD = jnp.concatenate([hidden_BTD[:, begin - 1 : begin], hidden_BTD[:, begin + first : -1]], axis=1)
        return [hidden_BTD[:, begin - 1 : begin + first - 1], last_BCD][2 - len(completions) :]

    def prefill(self, params, prompt: Tokens, length: int) -> tuple[jax.Array, Cache]:
        """Hidden states of prompts and a cache filled with them; see Decoder.prefill."""
        return Decoder(self.config, params).prefill(prompt, length)

    def empty_cache(self, params, num_rows: int, length: int) -> Cache:
        """A cache without tokens; see Decoder.empty_cache."""
        return Decoder(self.config, params).empty_cache(num_rows, length)

    def extend(self, params, tokens_BT, cache: Cache, layers=None) -> tuple[jax.Array, Cache]:
        """Hidden states of the next tokens and the cache with them; see Decoder.extend."""
        return Decoder(self.config, params).extend(tokens_BT, cache, layers)

    def unstacked(self, params, num_rows: int) -> list[dict[str, jax.Array | Tiled]]:
        """The weights layer by layer, for `extend`; see Decoder.unstacked."""
        return Decoder(self.config, params).unstacked(num_rows)

    def unembedding(self, params) -> jax.Array:
        """The unembedding `[D, V]`, including the padding of the vocabulary."""
        return Decoder(self.config, params).unembedding()

    def apply(self, params, tokens_BT, positions_BT=None, mask_BT=None) -> jax.Array:
        """Logits `[B, T, V]`, float32. For evaluation of short texts: training never materialises this array."""
        return self.logits(self.hidden(params, Tokens(tokens_BT, mask_BT), positions_BT), self.unembedding(params))

    def logits(self, hidden_XD, unembedding_DV: jax.Array | Tiled) -> jax.Array:
        """Logits `[..., V]`, float32, of hidden states `[..., D]`, soft-capped if the family has a soft-cap."""
        return self.capped(product(hidden_XD, unembedding_DV, jnp.float32))

    def capped(self, products_XV: jax.Array) -> jax.Array:
        """Logits from products with the unembedding: without the vocabulary's padding, and soft-capped."""
        return softcap(products_XV[..., : self.config.vocab_size], self.config.logit_softcap)

    @property
    def head_settings(self) -> dict[str, Any]:
        """Keyword arguments of the losses over hidden states: the model's `logit_softcap` and `vocab_size`."""
        return {"logit_softcap": self.config.logit_softcap, "vocab_size": self.config.vocab_size}


def parameter_shardings(config: DecoderConfig, mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """The sharding of each parameter on a mesh."""
    table = parameter_table(config)
    return {name: named_sharding(mesh, info.axes, info.shape, name) for name, info in table.items()}


def vocab_padding(config: DecoderConfig, mesh: Mesh | AbstractMesh | None) -> int:
    """Rows that are added to the tables, which are sharded along the vocabulary.

    With a multiple of the key/value heads, too, most meshes have the same shapes.
    """
    parts = 1 if mesh is None else math.prod(mesh.shape[name] for name in LOGICAL_TO_MESH["vocabulary"])
    return -config.vocab_size % math.lcm(config.num_kv_heads, parts)


def load_pretrained(
    source: str, dtype=jnp.float32, mesh: Mesh | None = None, *, remat: bool = False, attention: str = "auto"
) -> Model:
    """Loads an instruction-tuned decoder.

    Args:
      source: a Hugging Face folder, a `.gguf` file, `package://MODULE/PATH` or `hf://OWNER/NAME`.
      dtype: of the parameters and the activations.
      mesh: the mesh that holds the parameters; default: the first device.
      remat: recompute each layer in the backward pass (less memory, a quarter more work).
      attention: "plain", "splash" (TPU), "cudnn" (GPU) or "auto", which chooses by dtype and device.

    Raises:
      InputError: an unknown attention, a missing source, an unsupported architecture or tokenizer, or weights that do
        not match the config.
    """
    if attention not in ("auto", *KERNELS):
        raise InputError(f"attention {attention!r} is not known; use auto, {', '.join(KERNELS)}")
    path = resolve(source)
    weights = open_weights(path)
    config = config_of(weights)
    if config.tied_embeddings and head_differs(weights):
        config = replace(config, tied_embeddings=False)
        weights.hf_config["tie_word_embeddings"] = False
    if attention == "cudnn" and (why := why_not_cudnn(dtype, config.attention_softcap)):
        raise InputError(f"{source}: model.attention is cudnn, and {why}; use auto or plain")
    kernel = best_kernel(dtype, config.attention_softcap, config.head_width) if attention == "auto" else attention
    config = replace(config, remat=remat, vocab_padding=vocab_padding(config, mesh), kernel=kernel)
    tokenizer = tokenizer_of(weights, config.vocab_size)
    params = load_parameters(weights, config, dtype, mesh)
    return Model(
        config, params, tokenizer, dict(weights.hf_config), source, weights.generation_config, weights.with_vision
    )
