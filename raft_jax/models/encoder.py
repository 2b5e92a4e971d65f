"""The sentence encoder: one vector per text (the phi of RAFT, arXiv:2606.00147, Eq. 2)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from raft_jax.errors import InputError
from raft_jax.files import require_regular
from raft_jax.models.encoder_families import (
    ACTIVATIONS,
    NUM_RELATIVE_BUCKETS,
    EncoderConfig,
    load_parameters,
    read_config,
)
from raft_jax.sources import fingerprint_model, resolve

ROW_LENGTH = 256  # tokens; short texts share rows of this length, so that one compiled program serves all of them
MOSTLY_UNKNOWN = 0.5  # a text with a larger share of unknown characters has no similarity
TEXT_LENGTH = 128  # tokens; length of the texts that batch_size counts

Parameters = dict[str, jax.Array]


def load_encoder(
    source: str, *, dtype: jax.typing.DTypeLike = jnp.float32, prefix: str | None = None, batch_size: int = 32
) -> Encoder:
    """Loads a sentence encoder from a sentence-transformers or plain Hugging Face folder.

    Args:
      source: `package://MODULE/PATH`, `hf://OWNER/NAME` or a folder with config.json, tokenizer.json,
        model.safetensors and, where they exist, modules.json, the pooling's config.json,
        sentence_bert_config.json, tokenizer_config.json and config_sentence_transformers.json.
      dtype: of the weights and of the arithmetic; norms, softmax and pooling are always float32.
      prefix: prepended to every text, such as "query: " for e5; None: the folder's default, if any.
      batch_size: size of one call of the compiled program, in texts of 128 tokens.

    Returns:
      The encoder. Without modules.json it pools by the mean and does not normalise, as sentence-transformers does.

    Raises:
      InputError: something in the folder is missing, damaged or not supported; the message names it.
    """
    folder = resolve(str(source))
    if not folder.is_dir():
        raise InputError(f"{source}: expected a folder with config.json, tokenizer.json and model.safetensors")
    config, model_folder = read_config(folder, prefix)
    tokenizer = _load_tokenizer(model_folder / "tokenizer.json", config)
    identity = f"{fingerprint_model(folder)} prefix {config.prefix!r}"
    return Encoder(config, load_parameters(model_folder, config, dtype), tokenizer, batch_size, identity)


class Encoder:
    """A sentence encoder: `config`, `params` (a pytree, layers stacked [L, ...]) and `encode`.

    Attributes:
      identity: identifies the model: encoders with the same identity give equal embeddings.
      num_truncated: number of texts that the last `encode` truncated to `config.max_tokens`.
      unknown_shares: for each text of the last `encode`, the share of its characters in words outside the vocabulary.
    """

    def __init__(
        self, config: EncoderConfig, params: Parameters, tokenizer: Tokenizer, batch_size: int = 32, identity: str = ""
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is not allowed; use 1 or more")
        self.config = config
        self.params = params
        self.batch_size = batch_size
        self.identity = identity
        self.num_truncated = 0
        self.unknown_shares: list[float] = []
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> np.ndarray:
        """Embeds texts.

        Args:
          texts: any number of texts, which may be empty. Names of special tokens in them stay ordinary text.
          progress: called after each batch with the number of texts in it.

        Returns:
          [num_texts, D] float32, in the order of `texts`. Texts longer than `config.max_tokens` tokens are truncated,
          and counted in `num_truncated`.
        """
        if isinstance(texts, str):
            raise ValueError("encode takes a list of texts, got one text; pass [text]")
        ids = self._tokenize(texts)
        embeddings_ND = np.zeros((len(ids), self.config.embedding_width), np.float32)
        for row_length, indices in self._by_row_length(ids):
            rows = [[indices[i] for i in row] for row in pack([len(ids[index]) for index in indices], row_length)]
            most_rows = max(1, self.batch_size * TEXT_LENGTH // row_length)
            num_rows = most_rows if len(rows) >= most_rows else 1 << (len(rows) - 1).bit_length()
            for start in range(0, len(rows), num_rows):
                batch = rows[start : start + num_rows]
                arrays = _fill([[ids[index] for index in row] for row in batch], num_rows, row_length)
                embeddings_BSD = np.asarray(embed(self.params, *arrays, config=self.config))
                for row, embeddings_SD in zip(batch, embeddings_BSD, strict=False):
                    embeddings_ND[row] = embeddings_SD[: len(row)]
                if progress is not None:
                    progress(sum(map(len, batch)))
        return embeddings_ND

    def _by_row_length(self, ids: list[list[int]]) -> list[tuple[int, list[int]]]:
        """Text indices grouped by row length: 256 tokens, 1024, 4096, ..., and never more than max_tokens."""
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(ids):
            row_length = ROW_LENGTH
            while row_length < len(row):
                row_length *= 4
            groups.setdefault(min(row_length, self.config.max_tokens), []).append(index)
        return sorted(groups.items(), reverse=True)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        for index, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"text {index} holds a lone surrogate and is not UTF-8 ({error})") from None
            except AttributeError:
                raise ValueError(f"text {index} is a {type(text).__name__}, not a str") from None
        texts = [self.config.prefix + text for text in texts]
        if self.config.lower_case:
            texts = [text.lower() for text in texts]
        encodings = self._tokenizer.encode_batch_fast(texts)
        self.num_truncated = sum(bool(encoding.overflowing) for encoding in encodings)
        self.unknown_shares = [
            self._unknown_share(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)
        ]
        return [encoding.ids for encoding in encodings]

    def _unknown_share(self, text: str, ids: list[int]) -> float:
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        unknown_id = None if unknown is None else self._tokenizer.token_to_id(unknown)
        if unknown_id is None or unknown_id not in ids:
            return 0.0
        encoding = self._tokenizer.encode(text)  # with offsets, which encode_batch_fast omits
        lengths = [end - start for start, end in encoding.offsets]
        lost = sum(length for length, token in zip(lengths, encoding.ids, strict=True) if token == unknown_id)
        return lost / max(1, sum(lengths))


def similarities(
    encoder: Encoder, texts: Sequence[str], others: Sequence[str], progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """Eq. 2 for each text and `others` at the same index, `[num_texts]` float32; prints how many were truncated.

    NaN where most of either text is unknown to the encoder: all such texts have nearly the same embedding.
    """
    num_cut, embeddings, unknown = 0, [], []
    for side in (texts, others):
        embeddings.append(encoder.encode(side, progress=progress))
        num_cut += encoder.num_truncated
        unknown.append(np.asarray(encoder.unknown_shares) > MOSTLY_UNKNOWN)
    if num_cut:
        print(
            f"{num_cut} of {len(texts) + len(others)} texts are longer than the encoder's "
            f"{encoder.config.max_tokens} tokens: their similarity is that of their beginnings",
            flush=True,
        )
    unknown_N = np.logical_or(*unknown)
    if unknown_N.any():
        print(
            f"{unknown_N.sum()} of {len(texts)} pairs of texts are mostly unknown to the sentence encoder and have "
            "no similarity; set encoder.source to one that knows their language",
            flush=True,
        )
    return np.where(unknown_N, np.float32(np.nan), cosine_similarity(*embeddings))


def cosine_similarity(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    """Cosine of the angle between each row of a and the same row of b: a·b / (|a| |b|).

    Args:
      a_ND: [N, D] embeddings.
      b_ND: [N, D] embeddings.

    Returns:
      [N] float32 in [-1, 1]; 0 where either row is zero. RAFT (arXiv:2606.00147), Eq. 2.

    Example:
      >>> cosine_similarity(np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[6.0, 8.0], [0.0, 2.0]])).tolist()
      [1.0, 0.0]
    """
    a_ND, b_ND = np.asarray(a_ND, np.float64), np.asarray(b_ND, np.float64)
    if a_ND.ndim != 2 or a_ND.shape != b_ND.shape:
        raise ValueError(f"a_ND has shape {a_ND.shape} and b_ND {b_ND.shape}; both must be the same [N, D]")
    norms_N = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    cosines_N = np.einsum("nd,nd->n", a_ND, b_ND) / np.where(norms_N > 0, norms_N, 1.0)
    return np.clip(cosines_N, -1.0, 1.0).astype(np.float32)


@partial(jax.jit, static_argnames="config")
def embed(
    params: Parameters,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    *,
    config: EncoderConfig,
) -> jax.Array:
    """Packed rows of token ids → one pooled vector per text, normalised if the model's config says so.

    Args:
      params: an encoder's params.
      tokens_BT: token ids; a row holds several texts one after another.
      positions_BT: each token's position in its own text, from 0.
      segments_BT: the index of each token's text in its row, from 0, below S = texts_a_row(T); -1 for padding.
      config: the encoder's config.

    Returns:
      [B, S, D] float32; values at indices that a row does not use have no meaning.
    """
    # By default TPU and GPU round float32 products to fewer bits; similarities are compared with a threshold.
    with jax.default_matmul_precision("float32"):
        hidden_BTD = encoder_hidden(params, tokens_BT, positions_BT, segments_BT, config).astype(jnp.float32)
        embeddings_BSD = _pool(hidden_BTD, positions_BT, segments_BT, config.poolings)
    if config.normalize:
        norms_BS1 = jnp.linalg.norm(embeddings_BSD, axis=-1, keepdims=True)
        embeddings_BSD = embeddings_BSD / jnp.maximum(norms_BS1, 1e-12)
    return embeddings_BSD


def encoder_hidden(
    params: Parameters, tokens_BT: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, config: EncoderConfig
) -> jax.Array:
    """The last layer's hidden states [B, T, D]; a token attends to the tokens of its own segment."""
    hidden_BTD = params["token_VD"][tokens_BT] + params["position_PD"][positions_BT + config.first_position]
    if "token_type_YD" in params:
        hidden_BTD += params["token_type_YD"][0]
    hidden_BTD = _layer_norm(hidden_BTD, params["norm_scale_D"], params["norm_bias_D"], config.norm_epsilon)
    visible_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    relative_1NTT = None
    if "relative_bias_RN" in params:  # distances within a text are the same in its packed row
        buckets_TT = relative_buckets(tokens_BT.shape[1])
        relative_1NTT = jnp.moveaxis(params["relative_bias_RN"][buckets_TT], -1, 0)[None]

    activation = ACTIVATIONS[config.activation]

    def layer(x_BTD: jax.Array, w: Parameters) -> tuple[jax.Array, None]:
        query_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, w["query_LDNH"]) + w["query_bias_LNH"]
        key_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, w["key_LDNH"]) + w["key_bias_LNH"]
        value_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, w["value_LDNH"]) + w["value_bias_LNH"]
        mixed_BTNH = jax.nn.dot_product_attention(
            query_BTNH, key_BTNH, value_BTNH, bias=relative_1NTT, mask=visible_B1TT
        )
        x_BTD = x_BTD + jnp.einsum("btnh,nhd->btd", mixed_BTNH, w["output_LNHD"]) + w["output_bias_LD"]
        x_BTD = _layer_norm(x_BTD, w["attention_norm_scale_LD"], w["attention_norm_bias_LD"], config.norm_epsilon)
        inner_BTF = activation(jnp.einsum("btd,df->btf", x_BTD, w["up_LDF"]) + w["up_bias_LF"])
        x_BTD = x_BTD + jnp.einsum("btf,fd->btd", inner_BTF, w["down_LFD"]) + w["down_bias_LD"]
        return _layer_norm(x_BTD, w["mlp_norm_scale_LD"], w["mlp_norm_bias_LD"], config.norm_epsilon), None

    stacked = {name: array for name, array in params.items() if name.rpartition("_")[2].startswith("L")}
    return jax.lax.scan(layer, hidden_BTD, stacked)[0]


def relative_buckets(num_steps: int) -> np.ndarray:
    """MPNet's bucket of key position minus query position, [T, T]: exact up to 7 steps, then logarithmic to 128.

    Example:
      >>> relative_buckets(3).tolist()  # keys after the query take the buckets from 16 on
      [[0, 17, 18], [1, 0, 17], [2, 1, 0]]
    """
    num_one_side, num_exact, max_distance = NUM_RELATIVE_BUCKETS // 2, NUM_RELATIVE_BUCKETS // 4, 128
    steps_back_TT = np.arange(num_steps)[:, None] - np.arange(num_steps)[None, :]
    distance_TT = np.abs(steps_back_TT)
    # float32, and in this order: other rounding would put distances at a bucket's edge into the next bucket.
    ratio_TT = np.log(np.maximum(distance_TT, 1).astype(np.float32) / np.float32(num_exact))
    far_TT = ratio_TT / np.float32(np.log(max_distance / num_exact)) * np.float32(num_one_side - num_exact)
    far_TT = np.minimum(num_exact + far_TT.astype(np.int64), num_one_side - 1)
    return np.where(distance_TT < num_exact, distance_TT, far_TT) + num_one_side * (steps_back_TT < 0)


def _layer_norm(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    x32_BTD = x_BTD.astype(jnp.float32)
    centred_BTD = x32_BTD - jnp.mean(x32_BTD, axis=-1, keepdims=True)
    variance_BT1 = jnp.mean(jnp.square(centred_BTD), axis=-1, keepdims=True)
    return (centred_BTD * jax.lax.rsqrt(variance_BT1 + epsilon) * scale_D + bias_D).astype(x_BTD.dtype)


def _pool(
    hidden_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, poolings: tuple[str, ...]
) -> jax.Array:
    member_BTS = segments_BT[..., None] == jnp.arange(texts_a_row(segments_BT.shape[1]))
    first_BTS = member_BTS & (positions_BT == 0)[..., None]
    lengths_BS1 = jnp.maximum(member_BTS.sum(axis=1), 1)[..., None]
    pooled = {
        "cls": lambda: jnp.einsum("bts,btd->bsd", first_BTS.astype(jnp.float32), hidden_BTD),
        "max": lambda: jnp.max(hidden_BTD[:, :, None], axis=1, where=member_BTS[..., None], initial=-1e9),
        "mean": lambda: jnp.einsum("bts,btd->bsd", member_BTS.astype(jnp.float32), hidden_BTD) / lengths_BS1,
    }
    return jnp.concatenate([pooled[name]() for name in poolings], axis=-1)


def texts_a_row(num_steps: int) -> int:
    """S, the maximum number of texts in one packed row of T tokens."""
    return max(1, num_steps // 8)


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Packs texts into rows: best fit, longest first.

    Returns:
      For each row the indices of its texts, which together have at most row_length tokens.

    Example:
      >>> pack([5, 100, 60, 150, 90], row_length=160)
      [[3, 0], [1, 2], [4]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fit = bisect_left(room, (lengths[index], 0))
        left, row = room.pop(fit) if fit < len(room) else (row_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if len(rows[row]) < texts_a_row(row_length):
            insort(room, (left - lengths[index], row))
    return rows


def _fill(rows: list[list[list[int]]], num_rows: int, row_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The array arguments of `embed`, from the token ids of each row's texts."""
    tokens_BT = np.zeros((num_rows, row_length), np.int32)
    positions_BT = np.zeros((num_rows, row_length), np.int32)
    segments_BT = np.full((num_rows, row_length), -1, np.int32)
    for b, row in enumerate(rows):
        start = 0
        for segment, ids in enumerate(row):
            place = slice(start, start + len(ids))
            tokens_BT[b, place] = ids
            positions_BT[b, place] = np.arange(len(ids))
            segments_BT[b, place] = segment
            start += len(ids)
    return tokens_BT, positions_BT, segments_BT


def _load_tokenizer(path: Path, config: EncoderConfig) -> Tokenizer:
    if not path.exists():
        raise InputError(f"{path}: no such file; save the tokenizer with transformers to get one")
    require_regular(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: not a tokenizer of the tokenizers library ({error})") from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        raise InputError(f"{path}: token id {largest} does not fit vocab_size {config.vocab_size} of config.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_tokens)
    tokenizer.encode_special_tokens = True
    return tokenizer
