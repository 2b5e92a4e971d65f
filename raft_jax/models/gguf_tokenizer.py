"""A GGUF file's tokenizer, rebuilt with the `tokenizers` library from the file's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raft_jax.errors import InputError
from raft_jax.terminal import one_line

# llama.cpp's names of pre-tokenizers, which split a text before byte-pair merges. With `whole`, a piece that is in the
# vocabulary becomes that token without merges.
GPT2_SPLIT = "default"
PRE_TOKENIZERS = {
    "smollm": dict(digits=True, pattern=GPT2_SPLIT),
    "gpt-2": dict(pattern=GPT2_SPLIT),
    "qwen2": dict(
        nfc=True,
        pattern=(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ),
    "llama-bpe": dict(
        whole=True,
        pattern=(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
    ),
}
# "gpt-4o" (Phi-4-mini) also splits words where lower case changes to upper case.
LOWER, UPPER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PRE_TOKENIZERS["gpt-4o"] = dict(
    pattern=(
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{SUFFIX}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
)
# Architectures for which transformers always uses one pre-tokenizer, whatever tokenizer.json says: an export with
# another pattern would give other ids than the model was trained on.
FIXED_PRE_TOKENIZER = {"qwen2": "qwen2"}
GGUF_NORMAL, GGUF_CONTROL, GGUF_USER_DEFINED = 1, 3, 4
PHI3_KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}
SPACE = "▁"  # how sentencepiece writes a space
# Tokens that end a chat turn, which may differ from the token that ends a text.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


def read_gguf(metadata: Mapping[str, Any], source: str) -> tuple[Any, dict[str, Any], list[int]]:
    """A byte-pair or a sentencepiece tokenizer from the fields of a GGUF file.

    Returns:
      The `tokenizers.Tokenizer`, its settings for transformers (special tokens and chat templates), and the ids that
      end a turn.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "missing")
    if kind not in ("gpt2", "llama"):
        raise InputError(
            f"{source}: tokenizer type {kind!r} is not supported; supported: gpt2 (byte-pair), llama (sentencepiece)"
        )
    if kind == "gpt2" and pre not in PRE_TOKENIZERS:
        raise InputError(f"{source}: pre-tokenizer {pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    arch = str(metadata.get("general.architecture"))
    if (wanted := FIXED_PRE_TOKENIZER.get(arch)) and (kind, pre) != ("gpt2", wanted):
        raise InputError(
            f"{source}: a {arch} model with the {kind} tokenizer {pre!r}, of which no export can be made: "
            f"transformers reads every {arch} tokenizer as {wanted!r}; correct tokenizer.ggml.pre if it "
            "is wrong, or give the model's Hugging Face folder"
        )
    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        backend = _byte_pairs(metadata, **PRE_TOKENIZERS[pre]) if kind == "gpt2" else _sentencepiece(metadata)
        _add_tokens(backend, metadata)
        ids = _token_ids(metadata, len(tokens), source)
        settings: dict[str, Any] = {
            f"{ours}_token": tokens[ids[theirs]] if theirs in ids else None
            for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        }
        begins = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe")
        if begins and settings["bos_token"] is not None:
            _begin_with(backend, settings["bos_token"])
    except KeyError as error:
        raise InputError(f"{source}: the GGUF metadata lacks {error.args[0]}") from error
    except InputError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{source}: the GGUF metadata describes no whole tokenizer ({one_line(error)})") from error
    prefix = "tokenizer.chat_template."
    templates = {name.removeprefix(prefix): text for name, text in metadata.items() if name.startswith(prefix)}
    if default := metadata.get("tokenizer.chat_template"):
        templates["default"] = default
    settings["chat_template"] = templates
    return backend, settings, [ids[name] for name in ("eot", "eom") if name in ids]


def _token_ids(metadata: Mapping[str, Any], num_tokens: int, source: str) -> dict[str, int]:
    """The ids of the special tokens that the file's fields give."""
    ids = {}
    for name in ("bos", "eos", "padding", "unknown", "eot", "eom"):
        if (index := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            if not 0 <= index < num_tokens:
                raise InputError(
                    f"{source}: tokenizer.ggml.{name}_token_id is {index}, and the file has {num_tokens} "
                    "tokens; correct or remove the field"
                )
            ids[name] = index
    return ids


def _byte_pairs(metadata, pattern: str, digits: bool = False, whole: bool = False, nfc: bool = False):
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=whole))
    if nfc:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern == GPT2_SPLIT:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    else:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata):
    """Merging pieces by score is BPE whose merges are all splits of a piece into two pieces, best score first."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    tokens, scores, kinds = (metadata[f"tokenizer.ggml.{field}"] for field in ("tokens", "scores", "token_type"))
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = sorted(
        (-score, vocab[token[:cut]], vocab[token[cut:]], cut, token)
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind == GGUF_NORMAL
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    )
    backend = Backend(
        models.BPE(
            vocab,
            [(token[:cut], token[cut:]) for *_, cut, token in merges],
            byte_fallback=True,
            fuse_unk=True,
            unk_token=tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)],
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _add_tokens(backend, metadata) -> None:
    """Adds the tokens that are matched first; those that end a turn are special even if the file says user-defined."""
    from tokenizers import AddedToken

    kinds = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    # No field says that Phi-3's special tokens strip the white space after them; llama.cpp decides it by the name.
    phi3 = (metadata.get("general.architecture"), metadata["tokenizer.ggml.model"]) == ("phi3", "llama")
    tokens = [
        (token, kind == GGUF_CONTROL or token in END_OF_TURN)
        for token, kind in kinds
        if kind in (GGUF_CONTROL, GGUF_USER_DEFINED)
    ]
    strips = {token for token, special in tokens if special or token == "</s>"} - PHI3_KEEP_SPACE
    backend.add_tokens(
        [
            AddedToken(token, special=special, normalized=False, rstrip=phi3 and token in strips)
            for token, special in tokens
        ]
    )


def _begin_with(backend, bos: str) -> None:
    """Makes encoding prepend bos, for users who load an export; our prompts get it from the chat template."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, backend.token_to_id(bos))]
    )
