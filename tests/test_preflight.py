"""What a chat template refuses is named with its row before anything runs, and lengths are said as they are."""

import pytest
import tiny

from raft_jax.config_file import load_config
from raft_jax.data.examples import Example
from raft_jax.errors import InputError
from raft_jax.lengths import Lengths, fitting, limits_that_keep, quantiles
from raft_jax.models.tokenizer import Tokenizer
from raft_jax.preflight import check_mesh
from raft_jax.run_data import RunData

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + tiny.CHAT_TEMPLATE
)
PLAIN = Example("plain", "Why?", "So.")
CLERK = Example("cl\x1berk", "Why?", "So.", turns=(("system", "You are a clerk."),))


def with_template(template: str) -> Tokenizer:
    return tiny.wrapped(tiny.make_tokenizer().backend, chat_template=template)


def test_a_template_without_system_turns_names_the_row_and_the_way_out(tmp_path):
    path = tiny.write_run(tmp_path)
    tokenizer = with_template(NO_SYSTEM)
    with pytest.raises(InputError, match=r"row 'cl\\x1berk': .*System role not supported.*column named 'context'"):
        fitting([PLAIN, CLERK], tokenizer, load_config(path), None)
    found = fitting([PLAIN, CLERK], tokenizer, load_config(path, ["data.skip_bad_rows=true"]), None)
    assert found.kept == [PLAIN] and list(found.bad) == [CLERK.id] and "no system turn" in found.bad[CLERK.id]


def test_bad_rows_are_counted_at_the_start_of_a_run(tmp_path):
    path = tiny.write_run(tmp_path)
    empty = [{**tiny.ROWS[0], "id": f"e\x1b{number}", "answer": ""} for number in range(5)]
    tiny.write_jsonl(tmp_path / "data.jsonl", [*tiny.ROWS, *empty])
    with pytest.raises(InputError, match=r":17: answer is empty; .*data\.skip_bad_rows=true"):
        RunData(load_config(path), tiny.make_tokenizer(), 512)
    rows = RunData(load_config(path, ["data.skip_bad_rows=true"]), tiny.make_tokenizer(), 512)
    lines = list(rows.describe())
    assert rows.incomplete and len(rows.train) == 12 and all(line.isprintable() for line in lines)
    assert "left out by data.skip_bad_rows: 5" in lines[2] and lines[-1] == "  … and 2 more"
    assert [":17: answer is empty" in lines[3], ":19: answer is empty" in lines[5]] == [True, True]


def several_answers(number: int, *answers: str) -> dict:
    return {**tiny.ROWS[number], "answer": list(answers)}


def test_several_answers_are_named_and_the_first_or_each_is_used(tmp_path):
    path = tiny.write_run(tmp_path)
    given = [several_answers(0, "Rule 1.", "Form 1."), *tiny.ROWS[1:2], several_answers(2, "Rule 3.", "Form 3.")]
    tiny.write_jsonl(tmp_path / "data.jsonl", [*given, *tiny.ROWS[3:]])
    first = RunData(load_config(path), tiny.make_tokenizer(), 512)
    assert first.incomplete and [row.id for row in (*first.train, *first.test)][:2] == ["q01", "q02"]
    assert "rows with several answers: 2 (q01, q03); the first is used; data.several_answers=each" in "\n".join(
        first.describe()
    )
    each = RunData(load_config(path, ["data.several_answers=each"]), tiny.make_tokenizer(), 512)
    assert [(row.id, row.answer) for row in each.train[:3]] == [
        ("q01#1", "Rule 1."),
        ("q01#2", "Form 1."),
        ("q02", tiny.ROWS[1]["answer"]),
    ]
    assert [row.id for row in each.test[:2]] == ["q03#1", "q03#2"]
    assert not each.incomplete and "each is a row" in "\n".join(each.describe())
    # Without a split column, all answers to a held-out question are held out.
    rows = [{"id": str(number), "question": f"Q{number}?", "answer": ["A.", "B."]} for number in range(12)]
    tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    data = RunData(load_config(path, ["data.several_answers=each", "data.held_out=4"]), tiny.make_tokenizer(), 512)
    assert len(data.test) == 8 and not {row.question for row in data.test} & {row.question for row in data.train}


def test_an_id_that_an_answer_would_share_with_a_row_is_named(tmp_path):
    path = tiny.write_run(tmp_path)
    taken = {**tiny.ROWS[2], "id": "q01#2"}
    rows = [several_answers(0, "Rule 1.", "Form 1."), *tiny.ROWS[1:], taken]
    tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    assert len(RunData(load_config(path), tiny.make_tokenizer(), 512).test) == 5
    with pytest.raises(InputError, match=r"the id 'q01#2' is that of a row, and of an answer of the row 'q01'; rename"):
        RunData(load_config(path, ["data.several_answers=each"]), tiny.make_tokenizer(), 512)


def test_lengths_and_limits():
    assert quantiles([3]) == [3] * 5 and quantiles([1] * 98 + [7, 9]) == [1, 1, 1, 7, 9]
    # Of 20 rows one may go: the longest question, or the longest answer, not both.
    lengths = [Lengths(n, 1) for n in range(1, 20)] + [Lengths(30, 9)]
    assert limits_that_keep(lengths) == (19, 1)
    assert limits_that_keep([*lengths[:-1], Lengths(1, 9)]) == (19, 9)


def test_limits_shorter_than_the_answers_are_said(tmp_path):
    path = tiny.write_run(tmp_path)
    said = "\n".join(RunData(load_config(path), tiny.make_tokenizer(), 512).describe_lengths(refines=True))
    assert "warning: evaluate.max_new_tokens=8 is shorter than the gold answers" in said
    config = load_config(path, ["evaluate.max_new_tokens=64", "refine.max_new_tokens=null"])
    assert config.refine_max_new_tokens == config.data.max_answer_tokens == 64
    assert "warning" not in "\n".join(RunData(config, tiny.make_tokenizer(), 512).describe_lengths(refines=True))
    config = load_config(path, ["evaluate.max_new_tokens=64", "refine.max_new_tokens=2"])
    said = "\n".join(RunData(config, tiny.make_tokenizer(), 512).describe_lengths(refines=True))
    assert "warning: refine.max_new_tokens=2 is shorter" in said


def test_a_mesh_is_checked_without_its_devices(tmp_path):
    path, decoder = tiny.write_run(tmp_path), tiny.make_config(vocab_size=100)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.width) == (4, 2, 32)
    for words, parts in (("mesh.fsdp=16 mesh.data=2", 32), ("mesh.tensor=2 mesh.fsdp=4 mesh.data=-1", 4)):
        assert check_mesh(load_config(path, words.split()), decoder) == parts
    for words, message in (
        ("mesh.tensor=4", r"key_LDKH: its kv_heads dimension of 2 .* mesh tensor = 4; set mesh\.tensor to a divisor"),
        ("mesh.fsdp=7", r"its width dimension of 32 does not divide over mesh fsdp = 7; set mesh\.fsdp"),
    ):
        with pytest.raises(InputError, match=message):
            check_mesh(load_config(path, words.split()), decoder)
