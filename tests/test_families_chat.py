"""Chats in the manner of each family's template: ids equal to transformers', and text stays text."""

import datetime

import pytest
from tiny import make_tokenizer, wrapped
from tokenizers import AddedToken
from transformers import AutoTokenizer

from raft_jax.errors import InputError

# Each style in short: its marks, where roles and ends stand, what it does with a system message and with white space.
STYLES = {
    "llama 3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '\\n\\n' + system }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}""",
    ),
    "qwen 2.5": (
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        """
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    ),
    "qwen 3": (
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        """
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages|length - 1 - loop.index0 %}
    {%- if message.role == 'user' and ns.last == -1 %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
    {%- else %}{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}""",
    ),
    "smollm 3": (
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        """
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{%- set mode = '/think' if enable_thinking else '/no_think' %}{% set custom = '' %}
{%- if messages[0].role == 'system' %}
    {%- set custom = messages[0].content %}
    {%- if '/no_think' in custom %}{% set mode = '/no_think' %}{% endif %}
    {%- set custom = custom.replace('/no_think', '').replace('/think', '').rstrip() %}
{%- endif %}
{{- '<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: ' + mode + '\\n\\n' + custom + '\\n<|im_end|>\\n' }}
{%- set before = '' if mode == '/think' else '<think>\\n\\n</think>\\n' %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{ '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}{{ '<|im_start|>assistant\\n' + before + message.content.lstrip('\\n') + '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + before }}{% endif %}""",
    ),
    "phi 4": (
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
        "<|endoftext|>",
        """
{%- for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}""",
    ),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "</s>",
        """
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system is defined %}{{ '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}
    {%- else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}
{%- endfor %}""",
    ),
    "gemma": (
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<eos>",
        """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}
{%- else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{%- for message in turns %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    ),
}
SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why, at 12:30?"}
SAID = {"role": "assistant", "content": "Form C-12 is due."}
AGAIN = {"role": "user", "content": "é 東京 👩‍🚀"}
CHATS = {
    "user": [ASKED],
    "system": [SYSTEM, ASKED],
    "assistant": [ASKED, SAID],
    "several turns": [SYSTEM, ASKED, SAID, AGAIN],
    "answered": [SYSTEM, ASKED, SAID, AGAIN, SAID],
}


@pytest.fixture(params=STYLES)
def style(request):
    marks, eos, template = STYLES[request.param]
    backend = make_tokenizer().backend
    backend.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return marks, wrapped(backend, chat_template=template.strip("\n"), bos_token=marks[0], eos_token=eos)


@pytest.mark.parametrize("thinking", [None, False, True])
def test_ids_are_those_of_transformers(tmp_path, style, thinking):
    _, ours = style
    ours.thinking = thinking
    given = {} if thinking is None else {"enable_thinking": thinking}
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for messages in CHATS.values():
        for generate in (True, False):
            found = ours.chat_prompt(messages, generate)
            assert found == theirs.apply_chat_template(
                messages, add_generation_prompt=generate, return_dict=False, **given
            )
            assert set(ours.special_ids.values()) & set(found)


def test_the_day_is_the_one_that_is_set(style):
    _, ours = style
    ours.date = datetime.date(2001, 2, 3)
    dated = "Today" in ours.template.text
    assert ("03 Feb 2001" in ours.render([ASKED])) == dated


@pytest.mark.parametrize("thinking", [None, False])
def test_answers_end_their_turn(style, thinking):
    _, ours = style
    ours.thinking = thinking
    for messages in (CHATS["assistant"], CHATS["answered"]):
        answer = ours.chat_answer(messages)
        assert ours.decode(answer).strip().endswith(SAID["content"]) and answer[-1] in ours.stop_ids
        whole = ours.chat_prompt(messages, add_generation_prompt=False)
        assert ours.token_text(answer[-1:]) in ours.backend.decode(whole, skip_special_tokens=False)


def test_marks_in_a_content_stay_text(style):
    marks, ours = style
    text = "a " + "".join(marks) + " b"
    plain = ours.chat_prompt([{"role": "user", "content": "a b"}])
    found = ours.chat_prompt([{"role": "user", "content": text}])
    special = set(ours.special_ids.values())
    assert [token for token in found if token in special] == [token for token in plain if token in special]
    assert text in ours.decode(found)


def test_mistral_says_why_it_refuses():
    marks, eos, template = STYLES["mistral"]
    backend = make_tokenizer().backend
    backend.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer = wrapped(backend, chat_template=template, bos_token="<s>", eos_token=eos)
    with pytest.raises(InputError, match="roles must alternate"):
        tokenizer.chat_prompt([ASKED, ASKED])
