"""Templates that take too long or fill the memory end in one line, wherever they do it."""

import jinja2
import pytest
from tiny import CHAT_TEMPLATE, make_tokenizer, wrapped

from raft_jax.errors import InputError
from raft_jax.models import chat_template
from raft_jax.models.chat_template import ChatTemplate
from raft_jax.models.tokenizer import tokenizer_from_folder

HI = [{"role": "user", "content": "Hi"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROW = (
    "{{% set ns = namespace(x='ab') %}}{{% for i in range(40) %}}{{% set ns.x = {} %}}{{% endfor %}}"
    "{{{{ ns.x | length }}}}"
)
TIME, MEMORY = r"takes longer than 0\.5 s$", "more than 128 MiB of memory$"
EITHER = f"(?:{TIME}|{MEMORY})"


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    monkeypatch.setattr(chat_template, "MEMORY_BYTES", 128 << 20)


def make(template: str, **named) -> ChatTemplate:
    return ChatTemplate(template, "here", named, ())


def text_of(template: ChatTemplate, messages=HI, **variables) -> str:
    return template.render([{"messages": messages, "add_generation_prompt": True, **variables}])[0]


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (LOOP, TIME),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", TIME),
        ("{{ (9 ** 9999999) % 7 }}{{ 9 ** 99999999 }}", TIME),
        ("{{ 'x' * 10 ** 9 }}", MEMORY),
        ("{{ messages[0].content | center(10 ** 9) }}", MEMORY),
        ("{{ '%999999999d' | format(1) }}", MEMORY),
        ("{{ '{:>999999999}'.format(1) }}", MEMORY),
        ("{{ messages[0].content.ljust(10 ** 9) }}", MEMORY),
        ("{{ ([0] * 10 ** 9) | length }}", MEMORY),
        (GROW.format("ns.x ~ ns.x"), EITHER),
        (GROW.format("ns.x | replace('a', ns.x)"), EITHER),
        (GROW.format("[ns.x, ns.x] | join"), EITHER),
        (GROW.format("ns.x | indent(9, true) ~ ns.x"), EITHER),
        (
            "{% for i in range(99999) %}{{ 'x' * 200 }}{% endfor %}",
            r"renders 19,999,800 characters; at most 16,777,216",
        ),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "maximum recursion depth exceeded"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_what_never_ends_is_refused(template, named):
    with pytest.raises(InputError, match=f"^here: the chat template refuses this conversation: .*{named}"):
        text_of(make(template))


@pytest.mark.parametrize(
    "condition",
    [
        "enable_thinking is false",
        "not add_generation_prompt",
        "messages | length > 2",
        "turn_token == '<|t|>'",
        "messages[-1].role == 'assistant'",
        "messages[0].role == 'system'",
        "messages[0].content | length > 50000",
    ],
)
def test_what_ends_only_sometimes_is_not_rendered_here(monkeypatch, condition):
    template = make("{% if " + condition + " %}" + LOOP + "{% endif %}{{ messages[0].content }}", turn_token="<|t|>")
    monkeypatch.setattr(ChatTemplate, "_render_here", None)
    if "turn_token" not in condition:
        assert text_of(template) == "Hi"


def test_what_is_longer_than_what_was_tried_is_not_rendered_here(monkeypatch):
    template = make("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert text_of(template) == "Hi"
    monkeypatch.setattr(ChatTemplate, "_render_here", None)
    long = [{"role": "user", "content": "é" * (chat_template.TRIED_CHARACTERS + 1)}]
    assert text_of(template, long) == long[0]["content"]
    assert text_of(template, HI * (chat_template.TRIED_TURNS + 1)) == "Hi" * (chat_template.TRIED_TURNS + 1)


def test_an_ordinary_conversation_reads_as_jinja_alone_renders_it():
    messages = [{"role": "user", "content": "What does the rule say of it? " * 20}] * 6
    plain = jinja2.Environment(trim_blocks=True).from_string(CHAT_TEMPLATE)
    expected = plain.render(messages=messages, add_generation_prompt=True)
    assert make(CHAT_TEMPLATE).render([{"messages": messages, "add_generation_prompt": True}]) == [expected]


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ raise_exception('\x1b[31mred\x07\n\u202eodd ' + 'x' * 999) }}", r"␛\[31mred␇ �odd x+…$"),
        ("{{ turn_token }}", "it prints turn_token, which nothing defines; .* tokenizer_config.json"),
        ("{{ 'a' ~ turn_token }}", "it prints turn_token"),
    ],
)
def test_refusals_are_one_harmless_line(template, named):
    with pytest.raises(InputError, match=named) as caught:
        text_of(make(template))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_undefined_names_may_be_asked_for():
    """And a name that is known to stand for nothing may be printed, as in transformers."""
    template = "{% if x is defined %}1{% endif %}{% if x %}2{% endif %}{{ x | default('3') }}{{ messages[0].name }}"
    assert text_of(make(template)) == "3"
    assert text_of(ChatTemplate("{{ bos_token }}.", "here", {}, ("bos_token",))) == "."


def test_names_of_extra_tokens_reach_the_template(tmp_path):
    template = "{% for m in messages %}{{ turn_token }}{{ m.content }}{{ over }}{% endfor %}"
    extra = {"turn_token": "<|im_start|>", "over": "<|im_end|>"}
    tokenizer = wrapped(make_tokenizer().backend, chat_template=template, extra_special_tokens=extra)
    tokenizer.save(tmp_path)
    again = tokenizer_from_folder(tmp_path)
    assert tokenizer.render(HI) == again.render(HI) == "<|im_start|>Hi<|im_end|>"
    again.save(tmp_path / "again")
    for path in tmp_path.glob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
