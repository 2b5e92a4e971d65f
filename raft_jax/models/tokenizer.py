"""Text ↔ ids, and conversations → prompts in the model's own chat template.

transformers reads the tokenizer of a folder and writes that of an export. This file adds the shielding of special
tokens' names in contents, the split of a conversation into prompt and answer, and errors that name what is unsupported.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from raft_jax.errors import InputError
from raft_jax.files import read_object
from raft_jax.models.chat_template import ChatTemplate
from raft_jax.models.gguf_tokenizer import END_OF_TURN, read_gguf
from raft_jax.models.sentencepiece import model_file
from raft_jax.models.tokenizer_files import (
    CONFIG,
    NAMED_TOKENS,
    check_files,
    configured_stops,
    default_template,
)
from raft_jax.models.transformers_quietly import transformers_quietly
from raft_jax.models.weights import GgufFile, SafetensorsFolder, open_weights
from raft_jax.sources import resolve
from raft_jax.terminal import one_line

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
# Contractions, digits, capitals, accents and white space, which tokenizers split differently.
CUT_IN_MANY_WAYS = "It's we'LL 12345 3.50 HelloWorld cafe\u0301 na\u00efve \u4f60\u597d!?\n\n  x\t y //\n"
THINKING_FLAG = re.compile(r"/(no_)?think")  # in a system message, a flag for the template
# Keys of tokenizer_config.json. NOT_WRITTEN: transformers 5 writes them for its own use. CARRIED_OVER: transformers 5
# no longer reads them, but other programs do.
NOT_WRITTEN = (
    "backend",
    "is_local",
    "local_files_only",
    "auto_map",
    "max_length",
    "stride",
    "truncation_strategy",
    "model_specific_special_tokens",
)
CARRIED_OVER = ("add_bos_token", "add_eos_token")


class Tokenizer:
    """Text ↔ ids, and conversations → prompts in the model's own chat template.

    The caller's text never becomes a special token: `<|im_end|>` in a question is encoded as ordinary text. Added
    tokens that are not special (Qwen's `<think>`, `<tool_call>`) are recognised anywhere in a text, as in transformers.

    Args:
      wrapped: transformers' `PreTrainedTokenizerFast`.
      source: origin of the tokenizer, for errors.
      stop_ids: ids that end a turn, in addition to eos_token's.
      stops_from: the file that gives them.
    """

    def __init__(self, wrapped, source: str, stop_ids: Sequence[int] = (), stops_from: str = ""):
        self.wrapped, self.source, self.stops_from = wrapped, source, stops_from
        self.backend = wrapped.backend_tokenizer  # tokenizers.Tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        # Variables of templates: the date (None: today), and whether the model may think first (None: its default).
        self.date: datetime.date | None = None
        self.thinking: bool | None = None
        self.sentencepiece: bytes | None = None  # contents of tokenizer.model
        self.carried_over: dict[str, Any] = {}
        self.named_tokens: dict[str, str] = wrapped.special_tokens_map
        blank = [name for name, token in wrapped.init_kwargs.items() if name.endswith("_token") and token is None]
        self.template = ChatTemplate(default_template(wrapped.chat_template, source), source, self.named_tokens, blank)
        if not self.named_tokens.get("eos_token"):
            raise InputError(f"{source}: no eos_token; set it in {CONFIG}, to the token that ends an answer")
        self.eos_id = self.id_of(self.named_tokens["eos_token"])
        self.pad_id = self.id_of(self.named_tokens.get("pad_token") or self.named_tokens["eos_token"])
        added = {token.content: token_id for token_id, token in self.backend.get_added_tokens_decoder().items()}
        stops = {self.eos_id, *stop_ids, *(added[name] for name in END_OF_TURN if name in added)}
        self.stop_ids: tuple[int, ...] = tuple(sorted(stops))
        self.special_ids = self._mark_special(stops)
        self._special = frozenset(self.special_ids.values())
        names = sorted(self.special_ids, key=len, reverse=True)
        self._special_name = "|".join(map(re.escape, names)) or "(?!)"
        self._before_name = re.compile(f"(?={self._special_name})")  # a lookahead, for overlapping names
        self._template_characters = frozenset(self.template.text)
        self._renamed: dict[str, Any] = {}

    def _mark_special(self, stops: set[int]) -> dict[str, int]:
        """Flags eos, pad, bos and tokens that end a turn as special; returns the ids of all special tokens by name."""
        marks = {self.named_tokens.get(name) for name in ("eos_token", "pad_token", "bos_token")}
        added = self.backend.get_added_tokens_decoder()
        for token_id, token in added.items():
            if not token.special and (token.content in marks or token_id in stops):
                token.special = True
                self.backend.add_special_tokens([token])
        # A special token of one character ("!" as padding) also occurs in ordinary text.
        alphabet = any(token.special and len(token.content) == 1 for token in added.values())
        alphabet = self.backend.get_vocab(with_added_tokens=False) if alphabet else {}
        return {
            token.content: token_id
            for token_id, token in added.items()
            if token.special and not (len(token.content) == 1 and token.content in alphabet)
        }

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def check_ids(self, vocab_size: int) -> None:
        """Raises InputError if a prompt, an answer or a text can contain an id that has no row in the embedding.

        A special token that the template does not name (Gemma 3's image tokens in its text-only models) cannot occur,
        so its id may be too large.
        """
        advice = f"and the model's vocab_size is {vocab_size}; resize the embedding or remove the token"
        named = {token for name, token in self.named_tokens.items() if name in self.template.text}
        named |= {self.named_tokens.get("pad_token")}
        beyond = [(token_id, token) for token, token_id in self.backend.get_vocab().items() if token_id >= vocab_size]
        for token_id, token in sorted(beyond):
            harmless = token in self.special_ids and token not in named and token not in self.template.text
            if token_id in self.stop_ids or not harmless:
                raise InputError(f"{self.source}: the token {token!r} has the id {token_id}, {advice}")
        if self.stop_ids[-1] >= vocab_size:
            raise InputError(f"{self.source}: eos_token_id of {self.stops_from} has {self.stop_ids[-1]}, {advice}")

    def id_of(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"{self.source}: the token {token!r} is not in the vocabulary")
        return token_id

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special token is added, and none is recognised in it."""
        self.backend.encode_special_tokens = True
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without special tokens and without a final token that ends a turn."""
        ids = ids[:-1] if len(ids) and ids[-1] in self.stop_ids else ids
        return self.token_text([token for token in ids if token not in self._special])

    def token_text(self, ids: Sequence[int]) -> str:
        """Text of the ids, including the names of special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def chat_prompt(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation in the model's template, as transformers gives them.

        Args:
          messages: `{"role", "content"}` each. Special tokens' names inside a content stay ordinary text.
          add_generation_prompt: whether to end where the assistant's answer begins.

        Raises:
          InputError: the template refuses the conversation, or leaves out a question or a system message.
        """
        shielded, marker = self._shield(messages)
        (text,) = self._render((shielded, add_generation_prompt))
        self._require_contents(shielded, text)
        return self._encode_rendered(text, marker)

    def _require_contents(self, messages: Sequence[Message], text: str) -> None:
        """Raises InputError if a message is missing: templates may silently omit contents of an unexpected form."""
        for message in messages:
            content = message["content"].strip()
            if message["role"] == "assistant" or content in text:  # earlier thoughts may be left out
                continue
            if message["role"] != "system" or THINKING_FLAG.sub("", content).strip() not in text:
                raise InputError(
                    f"{self.source}: the chat template leaves out or changes the {message['role']}'s text "
                    f"{one_line(content, 60)!r}; not supported"
                )

    def _shield(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """Messages with a marker before each special token's name, and the marker; the template's names have none."""
        used = self._template_characters.union(*(message["content"] for message in messages))
        private_use = map(chr, chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)))
        marker = next(character for character in private_use if character not in used)
        return [
            {**message, "content": self._before_name.sub(marker, message["content"])} for message in messages
        ], marker

    def _encode_rendered(self, text: str, marker: str) -> list[int]:
        if marker not in text:
            self.backend.encode_special_tokens = False
            return self.backend.encode(text, add_special_tokens=False).ids
        parts = re.split(f"(?<!{marker})({self._special_name})", text)  # text, name, text, ..., text
        text = "".join(marker + part if index % 2 else part.replace(marker, "") for index, part in enumerate(parts))
        if marker not in self._renamed:
            self._renamed[marker] = _renamed(self.backend, {name: marker + name for name in self.special_ids})
        return self._renamed[marker].encode(text, add_special_tokens=False).ids

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text in the model's template."""
        return self._render((messages, add_generation_prompt))[0]

    def _render(self, *conversations: tuple[Sequence[Message], bool]) -> list[str]:
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking}
        return self.template.render(
            [
                {"messages": list(messages), "add_generation_prompt": add_generation_prompt, **thinking}
                for messages, add_generation_prompt in conversations
            ],
            None if self.date is None else self.date.isoformat(),
        )

    def chat_answer(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the last message, the assistant's, as the model would generate it: its text and the end of the turn.

        Raises:
          InputError: the template refuses the conversation, changes the answer, or renders the prompt differently when
            it is answered.
        """
        shielded, marker = self._shield(messages)
        prompt_text, text = self._render((shielded[:-1], True), (shielded, False))
        self._require_answer(shielded[-1]["content"], prompt_text, text)
        prompt, whole = self._encode_rendered(prompt_text, marker), self._encode_rendered(text, marker)
        if whole[: len(prompt)] == prompt:
            answer = whole[len(prompt) :]
        else:  # the answer's first white space would merge into the prompt's last token; the model generates after it
            answer = self._encode_rendered(text[len(prompt_text) :], marker)
        ends = [index for index, token in enumerate(answer) if token in self.stop_ids]
        if not ends:
            return [*answer, self.eos_id]
        content = messages[-1]["content"].strip()
        if answer[ends[0]] not in self._special and content not in self.decode(answer[: ends[0]]):
            raise InputError(
                f"{self.source}: the answer {one_line(content, 60)!r} holds the token "
                f"{answer[ends[0]]}, at which the model stops (eos_token_id of {self.stops_from})"
            )
        return answer[: ends[0] + 1]

    def _require_answer(self, answer: str, prompt_text: str, text: str) -> None:
        thoughts = f"model.thinking={json.dumps(self.thinking)} and the answer {one_line(answer, 60)!r} disagree"
        if not text.startswith(prompt_text):
            raise InputError(
                f"{self.source}: the chat template renders an answered question differently; "
                + (f"{thoughts}: change one of them" if "think" in self.template.text else "not supported")
            )
        answer = answer.strip()
        if answer.startswith("<think>"):  # templates put thoughts on separate lines
            answer, prompt_text, text = ("".join(part.split()) for part in (answer, prompt_text, text))
        start = text.rfind(answer)
        if start < 0 or start + len(answer) < len(prompt_text):
            raise InputError(
                f"{self.source}: the chat template leaves out or changes the answer {one_line(answer, 60)!r}"
                + (f"; {thoughts}" if "think" in answer else "; not supported")
            )

    def save(self, folder: Path) -> None:
        """Writes the tokenizer and all its chat templates for transformers 4 and 5, and sentencepiece's
        tokenizer.model, the only file from which llama.cpp's converter reads such a vocabulary."""
        with transformers_quietly():
            self.wrapped.save_pretrained(folder, legacy_format=False)
        settings = {key: value for key, value in read_object(folder / CONFIG).items() if key not in NOT_WRITTEN}
        settings |= self.carried_over
        if settings["tokenizer_class"] == "TokenizersBackend":  # transformers 4, also under vLLM, knows the older name
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if tokens := settings.pop("extra_special_tokens", None):  # transformers 4 has another key for a list of them
            settings["additional_special_tokens"] = tokens
        if names := {name: token for name, token in self.named_tokens.items() if name not in NAMED_TOKENS}:
            settings["extra_special_tokens"] = names
        (folder / CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if self.sentencepiece is not None:
            (folder / "tokenizer.model").write_bytes(self.sentencepiece)


def _renamed(backend, names: Mapping[str, str]):
    """The same tokenizer with its special tokens renamed, so that the old names are ordinary text. Their other effects
    (white space that a special token strips, a space prepended to a text) are unchanged."""
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
    if "merges" in model:  # merges may build a special token's old name
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return Backend.from_str(json.dumps(spec))


def wrap(backend, **settings):
    """A `tokenizers.Tokenizer` with special tokens and chat template, as transformers' tokenizer."""
    with transformers_quietly():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings)


def _require_tokenizer_json(path: Path) -> None:
    """Raises InputError if the file itself is invalid; transformers' error does not name the file."""
    from tokenizers import Tokenizer as Backend

    try:
        Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: not a tokenizer of the tokenizers library ({one_line(error)})") from error


def _tell_other_ids(path: Path, wrapped) -> None:
    """Warns if transformers builds a class's own tokenizer that splits texts differently from tokenizer.json."""
    from tokenizers import Tokenizer as Backend

    name = type(wrapped).__name__
    if name == "TokenizersBackend":  # uses tokenizer.json unchanged
        return
    ours, theirs = (
        backend.encode(CUT_IN_MANY_WAYS, add_special_tokens=False).ids
        for backend in (Backend.from_file(str(path)), wrapped.backend_tokenizer)
    )
    if ours != theirs:
        print(
            f"{path}: cuts texts otherwise than transformers' {name}, which transformers takes for this model; so do "
            "this run and its exports, and other programs may give other ids",
            file=sys.stderr,
            flush=True,
        )


def tokenizer_from_folder(folder: Path) -> Tokenizer:
    """A folder's tokenizer as transformers reads it, without code from the folder and without network."""
    if not (folder / "tokenizer.json").exists():
        raise InputError(f"{folder}: tokenizer.json is missing; a sentencepiece-only tokenizer must be converted first")
    check_files(folder)
    stops_from, stop_ids = configured_stops(folder)
    with transformers_quietly():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            wrapped = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever the libraries raise
            _require_tokenizer_json(folder / "tokenizer.json")
            raise InputError(f"{folder}: transformers cannot read the tokenizer ({one_line(error)})") from error
    if not isinstance(wrapped, PreTrainedTokenizerFast):
        raise InputError(f"{folder}: a {type(wrapped).__name__} is not a tokenizer of the tokenizers library")
    _tell_other_ids(folder / "tokenizer.json", wrapped)
    tokenizer = Tokenizer(wrapped, str(folder), stop_ids, stops_from)
    config = read_object(folder / CONFIG, optional=True)
    tokenizer.carried_over = {key: config[key] for key in CARRIED_OVER if key in config}
    if (model := folder / "tokenizer.model").is_file():
        tokenizer.sentencepiece = model.read_bytes()
    return tokenizer


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Rebuilds a byte-pair or a sentencepiece tokenizer from the fields of a GGUF file."""
    backend, settings, stop_ids = read_gguf(metadata, source)
    tokenizer = Tokenizer(wrap(backend, **settings), source, stop_ids, "the GGUF metadata")
    tokenizer.sentencepiece = model_file(metadata) if metadata["tokenizer.ggml.model"] == "llama" else None
    return tokenizer


def tokenizer_of(weights: SafetensorsFolder | GgufFile, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model, from its weights' source; its ids must fit an embedding of `vocab_size` rows."""
    if isinstance(weights, GgufFile):
        tokenizer = tokenizer_from_gguf(weights.metadata, str(weights.path))
    else:
        tokenizer = tokenizer_from_folder(weights.folder)
    tokenizer.check_ids(vocab_size)
    return tokenizer


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a model, without its weights; sources as in load_pretrained."""
    path = resolve(source)
    if path.is_dir():
        return tokenizer_from_folder(path)
    return tokenizer_from_gguf(open_weights(path).metadata, str(path))
