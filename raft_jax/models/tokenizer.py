"""Tokenizer and chat template, from a Hugging Face folder or a GGUF file, without torch or transformers."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raft_jax.errors import InputError
from raft_jax.models.weights import open_weights, read_json
from raft_jax.sources import resolve

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# How llama.cpp names the way a text is cut before byte-pair merges.
GPT2_SPLIT = "default"
PRE_TOKENIZERS = {
    "smollm": dict(digits=True, pattern=GPT2_SPLIT),
    "gpt-2": dict(digits=False, pattern=GPT2_SPLIT),
    "qwen2": dict(digits=False, pattern=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )),
    "llama-bpe": dict(digits=False, pattern=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )),
}
GGUF_CONTROL, GGUF_USER_DEFINED = 3, 4


class Tokenizer:
    """Text ↔ ids, and conversations → prompts in the model's own chat template.

    Text that a caller gives never becomes a special token: `<|im_end|>` in a question stays five characters
    of text and more, as tokens of ordinary text.
    """

    def __init__(self, backend, settings: Mapping[str, Any], source: str):
        self.backend = backend  # tokenizers.Tokenizer
        self.settings = dict(settings)  # what tokenizer_config.json keeps
        self.source = source
        self.special_ids = {
            token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        if not self.settings.get("chat_template"):
            raise InputError(f"{source}: no chat template; an instruction-tuned model is needed")
        self._template = _compile(self.settings["chat_template"])
        eos = self._special("eos_token")
        if eos is None:
            raise InputError(f"{source}: no eos_token in the tokenizer's settings")
        self.eos_id = self.id_of(eos)
        pad = self._special("pad_token")
        self.pad_id = self.eos_id if pad is None else self.id_of(pad)
        stops = {self.eos_id, *self.settings.get("extra_stop_ids", ())}
        # A chat turn may end with another token than a text does.
        stops |= {self.special_ids[name] for name in ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
                  if name in self.special_ids}
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

    def token_text(self, token_id: int) -> str:
        """One token as text, special ones by their name."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def chat_prompt(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation in the model's template, as transformers gives them.

        Args:
          messages: `{"role", "content"}` each. Special tokens' names inside a content stay ordinary text.
          add_generation_prompt: end where the assistant's answer begins.
        """
        marker = _unused_character(messages)
        # A special token's name inside a content is broken by a marker while the template is rendered, so that
        # every unbroken one is the template's own.
        broken = [{**message, "content": self._break(message["content"], marker)} for message in messages]
        text = self.render(broken, add_generation_prompt)
        ids, position = [], 0
        if marker not in text:
            self.backend.encode_special_tokens = False
            return self.backend.encode(text, add_special_tokens=False).ids
        while position < len(text):
            start, token = min(
                ((text.find(name, position), name) for name in self.special_ids if text.find(name, position) >= 0),
                default=(len(text), None), key=lambda found: (found[0], -len(found[1] or "")),
            )
            ids += self.encode(text[position:start].replace(marker, ""))
            if token is None:
                break
            ids.append(self.special_ids[token])
            position = start + len(token)
        return ids

    def _break(self, content: str, marker: str) -> str:
        for name in self.special_ids:
            content = content.replace(name, name[0] + marker + name[1:])
        return content

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text in the model's template."""
        import jinja2

        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt,
                bos_token=self._special("bos_token") or "", eos_token=self._special("eos_token") or "",
                pad_token=self._special("pad_token") or "",
            )
        except jinja2.TemplateError as error:
            raise InputError(f"{self.source}: the chat template refuses this conversation: {error}") from error

    def chat_answer(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the last, assistant's message as the model would have to write it: its text and the end of its turn."""
        prompt = self.chat_prompt(messages[:-1])
        whole = self.chat_prompt(messages, add_generation_prompt=False)
        if whole[: len(prompt)] != prompt:
            raise InputError(f"{self.source}: the chat template renders an answered question differently; not supported")
        answer = whole[len(prompt):]
        ends = [index for index, token in enumerate(answer) if token in self.stop_ids]
        if not ends:
            return [*answer, self.eos_id]
        return answer[: ends[-1] + 1]

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        self.backend.save(str(folder / "tokenizer.json"))
        settings = {k: v for k, v in self.settings.items() if k not in ("chat_template", "extra_stop_ids")}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (folder / "chat_template.jinja").write_text(self.settings["chat_template"], "utf-8")


def _unused_character(messages: Sequence[Message]) -> str:
    """A private-use character that no message contains."""
    used = set().union(*(set(message["content"]) for message in messages))
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)


def _compile(template: str):
    """A chat template as transformers compiles it, in Jinja's sandbox."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise InputError(f"the chat template does not compile: {error}") from error


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
    settings = read_json(folder / "tokenizer_config.json")
    template_path = folder / "chat_template.jinja"
    if template_path.exists():
        settings["chat_template"] = template_path.read_text("utf-8")
    if isinstance(settings.get("chat_template"), list):  # several named templates
        settings["chat_template"] = {t["name"]: t["template"] for t in settings["chat_template"]}.get("default")
    generation = folder / "generation_config.json"
    if generation.exists():
        eos = read_json(generation).get("eos_token_id")
        settings["extra_stop_ids"] = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return Tokenizer(backend, settings, str(folder))


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """Rebuilds a byte-pair tokenizer from the fields of a GGUF file."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "missing")
    if kind != "gpt2":
        raise InputError(f"{source}: tokenizer type {kind!r} is not supported; supported: gpt2 (byte-pair)")
    if pre not in PRE_TOKENIZERS:
        raise InputError(f"{source}: pre-tokenizer {pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    rule = PRE_TOKENIZERS[pre]
    steps = [pre_tokenizers.Digits(individual_digits=True)] if rule["digits"] else []
    if rule["pattern"] == GPT2_SPLIT:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    else:
        steps.append(pre_tokenizers.Split(Regex(rule["pattern"]), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([
        AddedToken(token, special=kind == GGUF_CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True) if kind in (GGUF_CONTROL, GGUF_USER_DEFINED)
    ])
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    for ours, theirs in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        if (index := metadata.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            settings[ours] = tokens[index]
    return Tokenizer(backend, settings, source)


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a model, without its weights; sources as in load_pretrained."""
    path = resolve(source)
    if path.is_dir():
        return tokenizer_from_folder(path)
    return tokenizer_from_gguf(open_weights(path).metadata, str(path))
