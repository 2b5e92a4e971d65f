"""Folders as other people save them: read as transformers reads them, or refused in a line that names file and key."""

import json
import logging
import os
import socket
import subprocess
import sys

import pytest
from test_tokenizer import CHATS, chat_ids, gguf_fields, with_template
from tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import AutoTokenizer

from raft_jax.errors import InputError
from raft_jax.models.tokenizer import tokenizer_from_folder, tokenizer_from_gguf

CONFIG, MAP, TEMPLATE, GENERATION = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
OTHER = CHAT_TEMPLATE + "{# tools #}"
TURN = CHAT_TEMPLATE.replace("<|im_start|>", "<|turn|>")
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def folder(tmp_path):
    """`folder(files, **config)`: a folder with these files, and these keys of tokenizer_config.json."""

    def make(changes: dict, **config):
        make_tokenizer().save(tmp_path)
        for name, value in ({CONFIG: PLAIN | config} | changes).items():
            path = tmp_path / name
            if path.exists():
                path.unlink()
            if value is not None:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(
                    value
                    if isinstance(value, bytes)
                    else value.encode()
                    if isinstance(value, str)
                    else json.dumps(value).encode()
                )
        return tmp_path

    return make


def assert_as_transformers(tokenizer, folder):
    reference = AutoTokenizer.from_pretrained(folder)
    for messages in CHATS.values():
        assert tokenizer.chat_prompt(messages) == chat_ids(reference, messages, True)
    assert tokenizer.named_tokens == reference.special_tokens_map


@pytest.mark.parametrize(("model_type", "cut"), [("qwen2", "qwen2"), ("qwen2", "llama-bpe"), ("llama", "llama-bpe")])
def test_a_class_that_cuts_otherwise_than_tokenizer_json_is_named(folder, capsys, model_type, cut):
    cuts = tokenizer_from_gguf(gguf_fields(cut, ["12"], ["1 2"]), "here").backend.to_str()
    source = folder(
        {"tokenizer.json": cuts, "config.json": {"model_type": model_type}}, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer = tokenizer_from_folder(source)
    assert tokenizer.encode("12") == AutoTokenizer.from_pretrained(source).encode("12", add_special_tokens=False)
    told = f"{source}/tokenizer.json: cuts texts otherwise than transformers' Qwen2Tokenizer, "
    assert capsys.readouterr().err.startswith(told) == ((model_type, cut) == ("qwen2", "llama-bpe"))


# Chat templates


@pytest.mark.parametrize(
    ("changes", "config", "others"),
    [
        ({TEMPLATE: None}, {"chat_template": {"default": CHAT_TEMPLATE, "tool_use": OTHER}}, {"tool_use": OTHER}),
        (
            {TEMPLATE: None},
            {"chat_template": [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "rag", "template": OTHER}]},
            {"rag": OTHER},
        ),
        ({TEMPLATE: None, "additional_chat_templates/default.jinja": CHAT_TEMPLATE}, {}, {}),
        ({"additional_chat_templates/tool_use.jinja": OTHER}, {}, {"tool_use": OTHER}),
    ],
)
def test_templates_with_names(folder, tmp_path, changes, config, others):
    """The default one renders chats; an export keeps the others."""
    source = folder(changes, **config)
    tokenizer = tokenizer_from_folder(source)
    assert tokenizer.template.text == CHAT_TEMPLATE
    assert_as_transformers(tokenizer, source)
    tokenizer.save(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == ({"default": CHAT_TEMPLATE, **others} if others else CHAT_TEMPLATE)
    assert_as_transformers(tokenizer_from_folder(tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (7, "chat_template is 7; expected"),
        ([{"name": "default"}], "chat_template is .*; expected"),
        ([CHAT_TEMPLATE], "chat_template is .*; expected"),
        ({"default": None}, "chat_template is .*; expected"),
        (True, "chat_template is True; expected"),
        ([[]], "chat_template is"),
        ({"default": {"a": 1}}, "chat_template is"),
        (
            [{"name": "chat", "template": OTHER}, {"name": "tool_use", "template": OTHER}],
            r"has the templates chat, tool_use and no default; put the right one in chat_template\.jinja",
        ),
        ([], "no chat template"),
        ({}, "no chat template"),
        ("", "no chat template"),
        ({"default": CHAT_TEMPLATE, "../x": OTHER}, r"the name '\.\./x' of a chat template"),
    ],
)
def test_templates_that_are_none(folder, value, named):
    source = folder({TEMPLATE: None}, chat_template=value)
    with pytest.raises(InputError, match=named) as caught:
        tokenizer_from_folder(source)
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    if "expected" in named:
        assert CONFIG in str(caught.value)


def test_places_that_are_not_read(folder):
    with pytest.raises(InputError, match=r"chat_template\.json is not read; put its template in chat_template\.jinja"):
        tokenizer_from_folder(folder({TEMPLATE: None, "chat_template.json": {"chat_template": CHAT_TEMPLATE}}))


def test_named_templates_of_gguf_files(tmp_path):
    fields = gguf_fields("gpt-2", [], []) | {"tokenizer.chat_template.tool_use": OTHER}
    tokenizer_from_gguf(fields, "here").save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == {"default": CHAT_TEMPLATE, "tool_use": OTHER}
    del fields["tokenizer.chat_template"]
    with pytest.raises(InputError, match=r"has the templates tool_use and no default; set the field tok"):
        tokenizer_from_gguf(fields, "here.gguf")


# Special tokens


@pytest.mark.parametrize(
    ("changes", "config", "eos"),
    [
        ({MAP: {"eos_token": "<|im_end|>"}}, {"eos_token": None}, "<|im_end|>"),
        ({MAP: {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, {"eos_token": None}, "<|im_end|>"),
        ({CONFIG: {"tokenizer_class": "Qwen2Tokenizer"}}, {}, "<|endoftext|>"),
        ({TEMPLATE: "{{ bos_token }}" + CHAT_TEMPLATE}, {"tokenizer_class": "GPT2Tokenizer"}, "<|im_end|>"),
    ],
)
def test_tokens_that_stand_elsewhere(folder, tmp_path, changes, config, eos):
    """In special_tokens_map.json, or in the defaults of the tokenizer's class."""
    source = folder(changes, **config)
    tokenizer = tokenizer_from_folder(source)
    assert tokenizer.eos_id == tokenizer.id_of(eos)
    assert_as_transformers(tokenizer, source)
    tokenizer.save(tmp_path / "out")
    assert_as_transformers(tokenizer_from_folder(tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize("name", [CONFIG, MAP])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token", False),
        ("eos_token", 7),
        ("bos_token", {"id": 3}),
        ("pad_token", ["<|pad|>"]),
        ("pad_token", {"__type": "AddedToken", "content": None}),
        ("extra_special_tokens", "<|turn|>"),
        ("extra_special_tokens", [None]),
        ("additional_special_tokens", [7]),
        ("extra_special_tokens", {"a": ["b"]}),
    ],
)
def test_tokens_that_are_none(folder, name, key, value):
    source = folder({name: PLAIN | {key: value}})
    with pytest.raises(InputError, match=rf"{name}: {key}.* is .*; expected a ") as caught:
        tokenizer_from_folder(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"extra_special_tokens": ["<|turn|>"]},
        {"additional_special_tokens": ["<|turn|>"]},
        {"added_tokens_decoder": {"508": {"content": "<|turn|>", "special": True, "normalized": False}}},
        {"extra_special_tokens": {"turn_token": "<|turn|>"}},
        {"eos_token": "<|turn|>"},
        {"pad_token": "<|turn|>"},
    ],
)
def test_tokens_that_transformers_adds(folder, tmp_path, config):
    """They are added alike; without a row of the embedding the model is refused."""
    source = folder({TEMPLATE: TURN}, **config)
    tokenizer = tokenizer_from_folder(source)
    assert_as_transformers(tokenizer, source)
    tokenizer.check_ids(509)
    with pytest.raises(InputError, match=r"'<\|turn\|>' has the id 508, and the model's vocab_size is 508; resize"):
        tokenizer.check_ids(508)
    tokenizer.save(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    # transformers 4 knows no TokenizersBackend, and takes a list of tokens under the older key alone.
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list) and "is_local" not in settings
    assert settings.get("additional_special_tokens", ["<|turn|>"]) == ["<|turn|>"]
    assert_as_transformers(tokenizer_from_folder(tmp_path / "out"), tmp_path / "out")


def test_a_special_token_that_no_chat_holds_needs_no_row(folder):
    """The models of text alone of Gemma 3 have no row for the token of images."""
    tokenizer_from_folder(folder({}, extra_special_tokens=["<image>"])).check_ids(508)
    source = folder({}, added_tokens_decoder={"508": {"content": "<tool>", "special": False, "normalized": False}})
    with pytest.raises(InputError, match="'<tool>' has the id 508"):
        tokenizer_from_folder(source).check_ids(508)


def test_marks_count_as_special_whatever_the_files_say(folder, tmp_path):
    backend = make_tokenizer().backend
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["special"] = False
    source = folder({"tokenizer.json": spec, GENERATION: {"eos_token_id": [504, 506]}}, bos_token="<|im_start|>")
    tokenizer = tokenizer_from_folder(source)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
    assert tokenizer.special_ids == {name: backend.token_to_id(name) for name in names}
    for name in names:
        assert not set(tokenizer.encode(name)) & set(tokenizer.special_ids.values())
        prompt = tokenizer.chat_prompt([{"role": "user", "content": name}])
        assert [i for i in prompt if i >= 504] == [505, 506, 505] and name in tokenizer.decode(prompt)
        assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.id_of(name), *tokenizer.encode("b")]) == "ab"
    tokenizer.save(tmp_path / "out")
    assert_as_transformers(tokenizer_from_folder(tmp_path / "out"), tmp_path / "out")


def test_a_character_as_padding_is_still_a_character(folder):
    tokenizer = tokenizer_from_folder(folder({}, pad_token="!"))
    assert tokenizer.decode(tokenizer.encode("Hi! <|im_end|>")) == "Hi! <|im_end|>"
    prompt = tokenizer.chat_prompt([{"role": "user", "content": "Hi! <|im_end|>"}])
    assert "Hi! <|im_end|>" in tokenizer.decode(prompt) and tokenizer.pad_id in prompt


# What ends a turn


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        (None, {"eos_token_id": [504, 507]}, (504, 506, 507)),
        (None, {"eos_token_id": 504}, (504, 506)),
        ({"eos_token_id": 507}, {"eos_token_id": 504}, (506, 507)),
        ({}, {"eos_token_id": [504]}, (504, 506)),
        (None, {"text_config": {"eos_token_id": 504}}, (504, 506)),
        (None, None, (506,)),
        ({"eos_token_id": []}, {}, (506,)),
    ],
)
def test_ids_that_end_a_turn(folder, generation, config, stops):
    assert tokenizer_from_folder(folder({GENERATION: generation, "config.json": config})).stop_ids == stops


@pytest.mark.parametrize("value", ["<|im_end|>", ["<|im_end|>"], -1, [506, -2], 1.5, [True], {"id": 506}, [[506]]])
@pytest.mark.parametrize("name", [GENERATION, "config.json"])
def test_ids_that_are_none(folder, name, value):
    with pytest.raises(InputError, match=rf"{name}: eos_token_id is .*; expected a token's id") as caught:
        tokenizer_from_folder(folder({name: {"eos_token_id": value}}))
    assert "\n" not in str(caught.value)


def test_an_id_beyond_the_embedding(folder):
    tokenizer = tokenizer_from_folder(folder({GENERATION: {"eos_token_id": [506, 99999]}}))
    with pytest.raises(InputError, match=r"eos_token_id of generation_config\.json has 99999, .* is 508; resize"):
        tokenizer.check_ids(508)


def test_gguf_fields_that_end_a_turn():
    fields = gguf_fields("gpt-2", [], [], special=["<|a|>", "<|b|>"])
    last = len(fields["tokenizer.ggml.tokens"]) - 1
    more = {"tokenizer.ggml.eot_token_id": last, "tokenizer.ggml.eom_token_id": last - 1}
    assert tokenizer_from_gguf(fields | more, "here").stop_ids == (last - 2, last - 1, last)
    for name in ("eot", "eos", "padding"):
        with pytest.raises(InputError, match=rf"ggml\.{name}_token_id is 999999, and the file has {last + 1} tokens"):
            tokenizer_from_gguf(fields | {f"tokenizer.ggml.{name}_token_id": 999999}, "here")


def test_an_answer_that_holds_what_the_model_stops_at(folder):
    newline = make_tokenizer().encode("\n")
    tokenizer = tokenizer_from_folder(folder({GENERATION: {"eos_token_id": [506, *newline]}}))
    with pytest.raises(InputError, match=r"'One Two' holds the token \d+, at which the model stops \(eos_token_id"):
        tokenizer.chat_answer([*HI, {"role": "assistant", "content": "One\nTwo"}])
    assert tokenizer.decode([*tokenizer.encode("One"), *newline]) == "One"


# What a template does with a conversation

THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set c = m.content %}{% set r = '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<think>\n{{ r }}\n</think>\n\n{{ c }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_thoughts_that_model_thinking_forbids():
    tokenizer = with_template(THINKS)
    answer = [*HI, {"role": "assistant", "content": "<think>Two gates.</think>Eight feet."}]
    assert "Eight feet." in tokenizer.decode(tokenizer.chat_answer(answer))
    tokenizer.thinking = False
    with pytest.raises(InputError, match=r"model\.thinking=false and the answer '<think>Two gates\.</th.*' disagree"):
        tokenizer.chat_answer(answer)
    assert tokenizer.decode(tokenizer.chat_answer([*HI, {"role": "assistant", "content": "Eight."}])) == "Eight."


@pytest.mark.parametrize(
    ("template", "messages", "named"),
    [
        (THINKS, [*HI, {"role": "assistant", "content": "Write </think> to close it."}], "changes the answer 'Write"),
        (
            "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
            "{% endif %}"
            "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
            [*HI, {"role": "assistant", "content": "Yes."}],
            "leaves out or changes the answer 'Yes.'",
        ),
        (
            "{% for m in messages %}{{ m.role }}:{{ m.content if m.role == 'user' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            [{"role": "user", "content": "Yes."}, {"role": "assistant", "content": "Yes."}],
            "changes the answer 'Yes.'",
        ),
    ],
)
def test_answers_that_are_not_rendered(template, messages, named):
    with pytest.raises(InputError, match=named):
        with_template(template).chat_answer(messages)


@pytest.mark.parametrize(
    ("template", "role"),
    [
        ("{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}", "user"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "system"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "system"),
    ],
)
def test_questions_that_are_not_rendered(template, role):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    with pytest.raises(InputError, match=f"leaves out or changes the {role}'s text"):
        with_template(template).chat_prompt(messages)


# Files


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({TEMPLATE: CHAT_TEMPLATE.encode() + b"{# caf\xe9 #}"}, rf"{TEMPLATE}: not UTF-8"),
        ({"additional_chat_templates/tool_use.jinja": b"\xff"}, r"tool_use\.jinja: not UTF-8"),
        ({CONFIG: b"\xff{}"}, CONFIG),
        ({CONFIG: "[" * 100_000}, CONFIG),
        ({CONFIG: "[]"}, "expected a JSON object"),
        ({MAP: "7"}, "expected a JSON object"),
        ({GENERATION: "{"}, GENERATION),
        ({GENERATION: '{"a":' * 90_000}, GENERATION),
        ({"tokenizer.json": '{"a":' * 90_000}, "not a tokenizer"),
        ({"tokenizer.json": "\x1b[31m"}, "not a tokenizer"),
        ({"tokenizer.json": {"model": {}, "added_tokens": 7}}, "not a tokenizer"),
        ({CONFIG: PLAIN | {"tokenizer_class": 7}}, "cannot read the tokenizer"),
        ({CONFIG: PLAIN | {"added_tokens_decoder": {"x": 7}}}, "cannot read the tokenizer"),
        ({CONFIG: PLAIN | {"model_max_length": []}, TEMPLATE: "x" * (2 << 20)}, "larger than 1 MiB"),
    ],
)
def test_damaged_files(folder, changes, named):
    with pytest.raises(InputError, match=named) as caught:
        tokenizer_from_folder(folder(changes))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG, MAP, TEMPLATE, GENERATION, "config.json"])
def test_other_things_in_place_of_files(folder, name):
    for make in (os.mkdir, os.mkfifo):
        source = folder({name: None})
        make(source / name)
        with pytest.raises(InputError, match=f"{name}: expected a file"):
            tokenizer_from_folder(source)
        os.rmdir(source / name) if make is os.mkdir else os.unlink(source / name)


def test_nothing_is_said_or_fetched(folder, monkeypatch, capfd, caplog):
    """Of a class that transformers warns of; its logging works as before afterwards."""
    source = folder({"config.json": {"model_type": "llama"}}, tokenizer_class="LlamaTokenizerFast")
    monkeypatch.setattr(socket.socket, "connect", None)
    tokenizer_from_folder(source)
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert logging.root.manager.disable == 0 and logging.getLogger("transformers").isEnabledFor(logging.WARNING)


def test_no_torch_is_imported(folder):
    program = (
        "import sys\nfrom pathlib import Path\nfrom raft_jax.models.tokenizer import tokenizer_from_folder\n"
        f"assert 'transformers' not in sys.modules\ntokenizer_from_folder(Path({str(folder({}))!r}))\n"
        "assert 'transformers' in sys.modules and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
