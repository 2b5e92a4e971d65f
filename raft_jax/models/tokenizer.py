"""Tokenizer and chat template, from a Hugging Face folder or a GGUF file, without torch or transformers."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from raft_jax.errors import InputError
from raft_jax.models.sentencepiece import model_file
from raft_jax.models.weights import open_weights, read_object
from raft_jax.sources import resolve

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# How llama.cpp names the way a text is cut before byte-pair merges. Where `whole` is set, a piece that is a token
# is taken as it is, without merges.
GPT2_SPLIT = "default"
PRE_TOKENIZERS = {
    "smollm": dict(digits=True, pattern=GPT2_SPLIT),
    "gpt-2": dict(pattern=GPT2_SPLIT),
    "qwen2": dict(nfc=True, pattern=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )),
    "llama-bpe": dict(whole=True, pattern=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )),
}
# The same of "gpt-4o" (Phi-4-mini): words end where their case does.
LOWER, UPPER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PRE_TOKENIZERS["gpt-4o"] = dict(pattern=(
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
))
GGUF_NORMAL, GGUF_CONTROL, GGUF_USER_DEFINED = 1, 3, 4
PHI3_KEEP_SPACE = {"<unk>", "<s>", "<|endoftext|>"}
SPACE = "▁"  # how sentencepiece writes a space
# A chat turn may end with another token than a text does.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


class Tokenizer:
    """Text ↔ ids, and conversations → prompts in the model's own chat template.

    Text that a caller gives never becomes a special token: `<|im_end|>` in a question stays tokens of ordinary text.
    Added tokens that the tokenizer does not flag as special (Qwen's `<think>`, `<tool_call>`) are tokens wherever they
    stand, as in transformers.
    """

    def __init__(self, backend, settings: Mapping[str, Any], source: str):
        self.backend = backend  # tokenizers.Tokenizer
        self.settings = dict(settings)  # what tokenizer_config.json keeps
        self.source = source
        # What templates are told: which day it is (default today), and whether the model may think first (its default).
        self.date: datetime.date | None = None
        self.thinking: bool | None = None
        self.sentencepiece: bytes | None = None  # its tokenizer.model
        self.special_ids = {
            token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        names = sorted(self.special_ids, key=len, reverse=True)
        self._special_name = "|".join(map(re.escape, names)) or "(?!)"
        self._renamed: dict[str, Any] = {}
        if not self.settings.get("chat_template"):
            raise InputError(f"{source}: no chat template; an instruction-tuned model is needed")
        self._template = _compile(self.settings["chat_template"], source)
        eos = self._special("eos_token")
        if eos is None:
            raise InputError(f"{source}: no eos_token in the tokenizer's settings")
        self.eos_id = self.id_of(eos)
        pad = self._special("pad_token")
        self.pad_id = self.eos_id if pad is None else self.id_of(pad)
        stops = {self.eos_id, *self.settings.get("extra_stop_ids", ())}
        stops |= {self.special_ids[name] for name in END_OF_TURN if name in self.special_ids}
        self.stop_ids: tuple[int, ...] = tuple(sorted(stops))

    def _special(self, name: str) -> str | None:
        value = self.settings.get(name)
        return value["content"] if isinstance(value, Mapping) else value

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def id_of(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"{self.source}: the token {token!r} is not in the vocabulary")
        return token_id

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing is added, and nothing in it is special."""
        self.backend.encode_special_tokens = True
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_text(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens by their names."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def chat_prompt(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation in the model's template, as transformers gives them.

        Args:
          messages: `{"role", "content"}` each. Special tokens' names inside a content stay ordinary text.
          add_generation_prompt: end where the assistant's answer begins.
        """
        shielded, marker = self._shield(messages)
        return self._encode_rendered(self.render(shielded, add_generation_prompt), marker)

    def _shield(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """The messages with a marker before each special token's name, so that those without one are the template's."""
        used = set(self.settings["chat_template"]).union(*(message["content"] for message in messages))
        private_use = map(chr, chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)))
        marker = next(character for character in private_use if character not in used)
        # The lookahead marks overlapping names too.
        name = re.compile(f"(?={self._special_name})")
        return [{**message, "content": name.sub(marker, message["content"])} for message in messages], marker

    def _encode_rendered(self, text: str, marker: str) -> list[int]:
        if marker not in text:
            self.backend.encode_special_tokens = False
            return self.backend.encode(text, add_special_tokens=False).ids
        parts = re.split(f"(?<!{marker})({self._special_name})", text)  # text, name, text, ..., text
        text = "".join(
            marker + part if index % 2 else part.replace(marker, "") for index, part in enumerate(parts)
        )
        if marker not in self._renamed:
            self._renamed[marker] = _renamed(self.backend, {name: marker + name for name in self.special_ids})
        return self._renamed[marker].encode(text, add_special_tokens=False).ids

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text in the model's template."""
        special = {name: self._special(name) for name in self.settings if name.endswith("_token")}
        now = datetime.datetime.now() if self.date is None else self.date
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking}
        try:
            return self._template.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=add_generation_prompt,
                strftime_now=now.strftime, **thinking,
                **{name: token for name, token in special.items() if isinstance(token, str)},
            )
        except Exception as error:  # a template can raise anything
            raise InputError(f"{self.source}: the chat template refuses this conversation: {error}") from error

    def chat_answer(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the last, assistant's message as the model would write it: its text and the end of its turn."""
        shielded, marker = self._shield(messages)
        prompt_text, text = self.render(shielded[:-1]), self.render(shielded, add_generation_prompt=False)
        if not text.startswith(prompt_text):
            raise InputError(
                f"{self.source}: the chat template renders an answered question differently; not supported"
            )
        prompt, whole = self._encode_rendered(prompt_text, marker), self._encode_rendered(text, marker)
        if whole[: len(prompt)] == prompt:
            answer = whole[len(prompt):]
        else:  # the answer's first white space would join the prompt's last token, and the model writes after that
            answer = self._encode_rendered(text[len(prompt_text):], marker)
        ends = [index for index, token in enumerate(answer) if token in self.stop_ids]
        if not ends:
            return [*answer, self.eos_id]
        return answer[: ends[0] + 1]

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja, and tokenizer.model of sentencepiece, from
        which alone llama.cpp's converter reads such a vocabulary."""
        self.backend.save(str(folder / "tokenizer.json"))
        settings = {k: v for k, v in self.settings.items() if k not in ("chat_template", "extra_stop_ids")}
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, "utf-8")
        (folder / "chat_template.jinja").write_text(self.settings["chat_template"], "utf-8")
        if self.sentencepiece is not None:
            (folder / "tokenizer.model").write_bytes(self.sentencepiece)


def _renamed(backend, names: Mapping[str, str]):
    """The same tokenizer with other names for its special tokens: what had been one is then ordinary text, and all that
    hangs on a special token (white space that it swallows, spaces that are set before a text) stays as it was."""
    from tokenizers import Tokenizer as Backend

    spec = json.loads(backend.to_str())
    spec["post_processor"] = None
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    if "merges" in model:  # a vocabulary may know how to put a special token's name together
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return Backend.from_str(json.dumps(spec))


def _compile(template: str, source: str):
    """A chat template as transformers compiles it, in Jinja's sandbox."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` tells transformers which text is the assistant's; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise InputError(f"{source}: the chat template does not compile: {error}") from error


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """From tokenizer.json, tokenizer_config.json, and chat_template.jinja where there is one."""
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{folder}: tokenizer.json is missing; a sentencepiece-only tokenizer must be converted first")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: not a tokenizer ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    settings = read_object(folder / "tokenizer_config.json")
    template_path = folder / "chat_template.jinja"
    if template_path.exists():
        settings["chat_template"] = template_path.read_text("utf-8")
    if isinstance(settings.get("chat_template"), list):  # several named templates
        settings["chat_template"] = {t["name"]: t["template"] for t in settings["chat_template"]}.get("default")
    generation = folder / "generation_config.json"
    if generation.exists():
        eos = read_object(generation).get("eos_token_id")
        settings["extra_stop_ids"] = eos if isinstance(eos, list) else [] if eos is None else [eos]
    tokenizer = Tokenizer(backend, settings, str(folder))
    if (model := folder / "tokenizer.model").is_file():
        tokenizer.sentencepiece = model.read_bytes()
    return tokenizer


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Rebuilds a byte-pair or a sentencepiece tokenizer from the fields of a GGUF file."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "missing")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{source}: tokenizer type {kind!r} is not supported; supported: gpt2 (byte-pair), llama "
                         "(sentencepiece)")
    if kind == "gpt2" and pre not in PRE_TOKENIZERS:
        raise InputError(f"{source}: pre-tokenizer {pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    try:
        backend = _byte_pairs(metadata, **PRE_TOKENIZERS[pre]) if kind == "gpt2" else _sentencepiece(metadata)
        _add_tokens(backend, metadata)
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            if (index := metadata.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
                settings[f"{ours}_token"] = metadata["tokenizer.ggml.tokens"][index]
        begins = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe")
        if begins and "bos_token" in settings:
            _begin_with(backend, settings["bos_token"])
    except KeyError as error:
        raise InputError(f"{source}: the GGUF metadata lacks {error.args[0]}") from error
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{source}: the GGUF metadata describes no whole tokenizer ({error})") from error
    tokenizer = Tokenizer(backend, settings, source)
    tokenizer.sentencepiece = model_file(metadata) if kind == "llama" else None
    return tokenizer


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
    """Pieces that join by their scores are byte pairs whose merges are all ways to split a piece, best score first."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    tokens, scores, kinds = (metadata[f"tokenizer.ggml.{field}"] for field in ("tokens", "scores", "token_type"))
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = sorted(
        (-score, vocab[token[:cut]], vocab[token[cut:]], cut, token)
        for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind == GGUF_NORMAL
        for cut in range(1, len(token)) if token[:cut] in vocab and token[cut:] in vocab
    )
    backend = Backend(models.BPE(
        vocab, [(token[:cut], token[cut:]) for *_, cut, token in merges], byte_fallback=True, fuse_unk=True,
        unk_token=tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)],
    ))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _add_tokens(backend, metadata) -> None:
    """Tokens that are found before all else; a chat's marks are special even where a file calls them the user's."""
    from tokenizers import AddedToken

    kinds = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    # No field says that the marks of Phi-3 swallow the white space behind them; llama.cpp knows it by the name.
    phi3 = (metadata.get("general.architecture"), metadata["tokenizer.ggml.model"]) == ("phi3", "llama")
    found = [
        (token, kind == GGUF_CONTROL or token in END_OF_TURN)
        for token, kind in kinds if kind in (GGUF_CONTROL, GGUF_USER_DEFINED)
    ]
    strips = {token for token, special in found if special or token == "</s>"} - PHI3_KEEP_SPACE
    backend.add_tokens([
        AddedToken(token, special=special, normalized=False, rstrip=phi3 and token in strips)
        for token, special in found
    ])


def _begin_with(backend, bos: str) -> None:
    """A text on its own begins with bos, for those who load an export: our prompts have it from their template."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, backend.token_to_id(bos))]
    )


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a model, without its weights; sources as in load_pretrained."""
    path = resolve(source)
    if path.is_dir():
        return tokenizer_from_folder(path)
    return tokenizer_from_gguf(open_weights(path).metadata, str(path))
