"""Bad input is one line that says what to do, and exit code 2; a log without a terminal is plain lines."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from raft_jax import generate as generate_module
from raft_jax import progress as progress_module
from raft_jax.cli import main
from raft_jax.config_file import load_config
from raft_jax.models import load_pretrained
from raft_jax.preflight import require_sources
from raft_jax.progress import progress
from raft_jax.resume import open_run_folder
from raft_jax.run import Run


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    tiny.write_run(folder)
    return folder


@pytest.fixture
def folder(template, tmp_path) -> Path:
    """A folder with everything that a run takes; what a test damages is its own copy."""
    config = yaml.safe_load((template / "config.yaml").read_text())
    config["run_dir"] = str(tmp_path / "run")
    for section, key, name in (("data", "path", "data.jsonl"), ("evaluate", "general_path", "general.jsonl")):
        (tmp_path / name).write_bytes((template / name).read_bytes())
        config[section][key] = str(tmp_path / name)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def complaint(capsys, *arguments: object) -> str:
    """What a command that must fail says, which is one line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("raft-jax: error: ") and "Traceback" not in err
    return err.removeprefix("raft-jax: error: ").rstrip("\n")


def write(folder: Path, lines: list) -> Path:
    path = folder / "data.jsonl"
    encoded = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


ROW, OTHER = ({"id": id, "question": f"Why {id}?", "answer": f"So {id}.", "split": "train"} for id in ("a", "b"))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ("no rows in it",)),
        ([ROW, b'{"id": "b", '], (":2: not JSON",)),
        ([ROW, OTHER, b'{"id": "\xff"}'], (":3: not UTF-8", "0xff")),
        ([ROW, [1]], (":2: expected an object",)),
        (
            [{"id": "a", "query": "Why?", "answer": "So.", "split": "train"}],
            (":1: no column 'question'", "id, query, answer, split", "data.question", "query"),
        ),
        ([{"id": "a", "question": "Why?", "reply": "So.", "split": "train"}], ("no column 'answer'", "data.answer")),
        ([ROW, {**OTHER, "question": " "}], (":2: question is empty",)),
        ([ROW, {**OTHER, "answer": ""}], (":2: answer is empty",)),
        ([ROW, {**OTHER, "answer": None}], (":2: answer must be text, got null",)),
        ([ROW, {**OTHER, "id": "a"}], (":2: the id 'a' is already that of", ":1")),
        ([{**ROW, "split": "trian"}], ("no rows of the split 'train'", "trian (1)", "data.train_split")),
    ],
)
def test_bad_rows_are_named_by_file_and_line(folder, capsys, lines, words):
    path = write(folder, lines)
    for verb in ("check", "run"):
        message = complaint(capsys, verb, folder / "config.yaml")
        assert message.startswith(str(path)) and all(word in message for word in words), message


def test_a_first_try_that_failed_leaves_nothing_in_the_way(folder, capsys):
    config = folder / "config.yaml"
    good = (folder / "data.jsonl").read_bytes()
    write(folder, [ROW, b"{"])
    assert "not JSON" in complaint(capsys, "refine", config)
    (folder / "data.jsonl").write_bytes(good)
    # The next complaints are about the next thing, not about changed data or a changed config.
    assert "none-such" in complaint(capsys, "refine", config, f"model.source={folder}/none-such")
    assert "none-such" in complaint(capsys, "refine", config, f"encoder.source={folder}/none-such")
    assert not (folder / "run/refined").exists()


def test_with_traceback_it_says_where_the_error_comes_from(folder, capsys):
    for arguments in (["--traceback"], ["train.batch_size=2", "--traceback"], ["--traceback", "train.batch_size=2"]):
        assert main(["check", str(folder / "config.yaml"), f"data.path={folder}/none.jsonl", *arguments]) == 2
        err = capsys.readouterr().err.splitlines()
        assert err[0] == "Traceback (most recent call last):" and any("files.py" in line for line in err)
        assert err[-1].startswith(f"raft-jax: error: data.path: {folder}/none.jsonl: no such file")


def test_options_may_stand_between_overrides_but_must_exist(folder, capsys):
    path = str(folder / "config.yaml")
    assert "learning_rate" in complaint(capsys, "check", path, "seed=1", "train.learning_rat=1")
    assert "which model?" in complaint(capsys, "generate")
    for arguments in (["check", path, "seed=1", "--trace-back", "seed=2"], ["chekc", path], []):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["check"])
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.path={folder}/none.jsonl", ("data.path: ", "none.jsonl: no such file or folder; check the path")),
        ("data.path={folder}/data.xlsx", ("no such file",)),
        ("model.source={folder}/none", ("model.source: ", "none: no such file")),
        ("model.source=package://none_such_module/x", ("none_such_module is not installed", "pip install")),
        ("model.source={folder}", ("config.json: no such file",)),
        ("encoder.source={folder}/none", ("encoder.source: ", "none: no such file")),
        ("evaluate.general_path={folder}/none", ("evaluate.general_path: ", "none: no such file")),
        ("evaluate.general_path={folder}/data.jsonl", ("data.jsonl:1: not a general prompt",)),
        ("evaluate.max_new_tokens=512", ("512 positions", "lower evaluate.max_new_tokens")),
        ("train.batch_size=16", ("12 rows do not fill a batch of 16; lower train.batch_size",)),
        ("train.rollout.max_new_tokens=500", ("512 positions", "train.rollout.max_new_tokens")),
        (
            "refine.max_new_tokens=180 data.max_answer_tokens=180 train.rollout.max_new_tokens=300",
            (
                "a row may take 5",
                "512 positions",
                "lower data.max_answer_tokens or refine.max_new_tokens or train.rollout",
            ),
        ),
        ("mesh.data=16", ("does not fit 8 device(s)", "mesh.data")),
        ("mesh.data=8", ("train.batch_size 4", "does not divide over mesh data×fsdp = 8")),
        ("mesh.tensor=4", ("mesh.tensor", "divisor of")),
        ("data.max_answer_tokens=2 refine.max_new_tokens=2", ("all 12 training rows are longer", "raise them")),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(folder, capsys, override, words):
    overrides = override.format(folder=folder).split()
    message = complaint(capsys, "run", folder / "config.yaml", *overrides)
    assert all(word in message for word in words), message
    assert not (folder / "run/refined").exists() and not (folder / "run/raft").exists()


def test_a_held_out_answer_beyond_the_models_positions_is_refused(folder, capsys):
    rows = [{**ROW, "id": f"train{number}"} for number in range(4)]
    write(folder, [*rows, {**ROW, "id": "endless", "split": "test", "answer": "word " * 150}])
    message = complaint(capsys, "run", folder / "config.yaml", "data.max_answer_tokens=2000")
    told = r"endless: question and gold answer have \d+ tokens, and the model has 512 positions; lower data\.max_"
    assert re.match(told, message)


def test_what_needs_no_encoder_does_not_ask_for_one(folder):
    require_sources(load_config(folder / "config.yaml", [f"encoder.source={folder}/none"]))


def test_asked_to_end_outside_training_it_says_how_to_go_on(folder, capsys, monkeypatch):
    monkeypatch.setattr(Run, "refine", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["refine", str(folder / "config.yaml")]) == 130
    assert capsys.readouterr().err == "\nraft-jax: stopped by SIGTERM; the same command goes on from here\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_half_a_coordinator_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    message = complaint(capsys, "train", folder / "config.yaml")
    assert "got JAX_COORDINATOR_ADDRESS=127.0.0.1:1, JAX_NUM_PROCESSES=None, JAX_PROCESS_ID=None" in message


def test_too_long_a_refinement_is_refused_before_it_starts(folder, capsys):
    overrides = ("refine.max_new_tokens=300", "data.max_answer_tokens=300")
    message = complaint(capsys, "refine", folder / "config.yaml", *overrides)
    assert "lower refine.max_new_tokens" in message and not (folder / "run/refined").exists()


def copy_model(template: Path, folder: Path) -> Path:
    (folder / "model").mkdir()
    for path in (template / "model").iterdir():
        (folder / "model" / path.name).write_bytes(path.read_bytes())
    return folder / "model"


def test_damaged_models_are_named(template, folder, capsys):
    config = folder / "config.yaml"
    model = copy_model(template, folder)

    def message():
        return complaint(capsys, "train", config, f"model.source={model}")

    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert str(weights) in message() and "not a whole safetensors file" in message()
    weights.unlink()
    assert "neither model.safetensors nor" in message()
    weights.write_bytes(whole)

    hf = json.loads((model / "config.json").read_text())
    for change, words in (
        ({"model_type": "mamba"}, "'mamba' is not supported; supported: gemma2, gemma3, gemma3_"),
        ({"hidden_size": 48}, "has shape"),
        ({"num_hidden_layers": 3}, "is missing"),
    ):
        (model / "config.json").write_text(json.dumps({**hf, **change}))
        assert words in message()
    (model / "config.json").write_text("{")
    assert "not valid JSON" in message()
    (model / "config.json").write_text(json.dumps(hf))
    (model / "tokenizer.json").write_text("{}")
    assert "not a tokenizer" in message()
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in message()


def test_damaged_gguf_files_are_named(folder, capsys, llama_config, random_tensors, write_gguf):
    tensors = random_tensors(llama_config)

    def message(**metadata):
        path = write_gguf(folder / "model.gguf", llama_config, tensors, **metadata)
        return complaint(capsys, "train", folder / "config.yaml", f"model.source={path}")

    assert "tokenizer type 'bert' is not supported; supported: gpt2" in message(tokenizer__ggml__model="bert")
    assert "lacks tokenizer.ggml.scores" in message(tokenizer__ggml__model="llama")
    assert "pre-tokenizer 'tekken' is not supported; supported: smollm" in message(tokenizer__ggml__pre="tekken")
    assert "GGUF architecture 'rwkv' is not supported; supported: gemma2, " in message(family="rwkv")
    path = write_gguf(folder / "model.gguf", llama_config, tensors)
    whole = path.read_bytes()
    for size, words in ((len(whole) // 2, "a truncated or damaged GGUF file"), (0, "not a GGUF file")):
        path.write_bytes(whole[:size])
        error = complaint(capsys, "train", folder / "config.yaml", f"model.source={path}")
        assert error.startswith(str(path)) and words in error


def test_the_config_is_checked_before_anything_else(folder, capsys):
    config = folder / "config.yaml"
    assert "Did you mean" in complaint(capsys, "run", config, "train.learning_rat=1")
    assert "train.batch_size" in complaint(capsys, "run", config, "train.batch_size=four")
    assert "no such file" in complaint(capsys, "run", folder / "none.yaml")
    config.write_text(config.read_text().replace("top_k: 16", "top_c: 16"))
    message = complaint(capsys, "run", config)
    assert message.startswith(f"{config}: ") and "top_c" in message and "Did you mean: 'top_k'" in message
    config.write_text(config.read_text().replace("top_c: 16", "top_k: sixteen"))
    message = complaint(capsys, "run", config)
    assert message.startswith(f"{config}: ") and "sixteen" in message and "train.top_k" in message
    assert not (folder / "run").exists()


def test_a_run_folder_that_cannot_be_one(folder, capsys):
    (folder / "file").write_text("")
    for run_dir in (folder / "file", folder / "file" / "below"):
        message = complaint(capsys, "run", folder / "config.yaml", f"run_dir={run_dir}")
        assert "cannot be used as run folder" in message and "set run_dir" in message


def test_a_run_folder_that_another_process_uses(folder, capsys):
    (folder / "run").mkdir()
    with (folder / "run" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = complaint(capsys, "run", folder / "config.yaml")
    assert message.startswith(str(folder / "run")) and "another process is running in this folder" in message


def test_a_report_is_made_of_what_is_there_while_a_run_goes_on(folder, capsys):
    message = complaint(capsys, "report", folder / "config.yaml")
    assert message.startswith(str(folder / "run")) and "no such run folder" in message
    with open_run_folder(load_config(folder / "config.yaml")):
        assert main(["report", str(folder / "config.yaml")]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "run" / "report.html")
    assert "not run yet" in (folder / "run" / "report.html").read_text()


def test_check_lists_what_does_not_fit_and_shows_an_example(folder, capsys):
    long = {**ROW, "id": "long [/bold] :key:", "answer": "word " * 90}
    tests = [
        {**OTHER, "id": "test", "question": "Why 日本 \u001b[31m?", "split": "test"},
        {**ROW, "id": "later", "split": "test"},
    ]
    write(folder, [ROW, long, OTHER, *tests, {**tests[0], "id": "asked", "question": "why " * 90}])
    assert main(["check", str(folder / "config.yaml"), "train.batch_size=2", "data.max_train=2"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and f"data: {folder / 'data.jsonl'}\n" in out
    limits = "left out, as longer than data.max_question_tokens=64 or data.max_answer_tokens=64: 1"
    assert re.search(
        rf"^training: 2 of 3 rows are used \(a sample, data.max_train=2\); {limits} \(long \[/bold\] :key:: "
        rf"answer of \d+ tokens\)\nheld-out: 2 of 3 rows are used; {limits} \(asked: question of \d+ tokens\)\n",
        out,
        re.M,
    )
    assert "held-out questions that are training questions, too: 1 (later); what is" in out
    assert "methods: raft; 2 steps of 2 rows each" in out
    assert "<|im_start|>user\nWhy a?<|im_end|>\n<|im_start|>assistant\nSo a.<|im_end|>" in out
    assert not (folder / "run").exists()


def test_generate_refuses_what_it_cannot_do(template, tmp_path, capsys):
    model, empty = template / "model", tmp_path / "empty"
    empty.write_text("\n")
    assert "what is 'more'?" in complaint(capsys, "generate", "What?", "--model", model, "more")
    assert "give a config before the question" in complaint(capsys, "generate", "What?")
    config = template / "config.yaml"
    assert "no such file" in complaint(capsys, "generate", template / "none.yaml", "What?")
    assert "learning_rate" in complaint(capsys, "generate", config, "What?", "--seed", 1, "train.learning_rat=1")
    assert "1 or more" in complaint(capsys, "generate", "What?", "--model", model, "--max-new-tokens", 0)
    assert "0 or more" in complaint(capsys, "generate", "What?", "--model", model, "--temperature", -1)
    assert "0 or more" in complaint(capsys, "generate", "What?", "--model", model, "--temperature", "nan")
    assert "what is 'b'? a question of several words" in complaint(capsys, "generate", config, "a", "b", "c?")
    assert "what is the question?" in complaint(capsys, "generate", config, "run_dir=x")
    assert "what is the question?" in complaint(capsys, "generate", "--model", model)
    assert "there is no question beside it; what is 'What?'" in complaint(
        capsys, "generate", config, "What?", "--questions", config
    )
    assert "expected a file, found a device" in complaint(capsys, "generate", config, "--questions", "/dev/zero")
    assert "empty: no questions in it" in complaint(capsys, "generate", config, "--questions", empty)
    assert main(["generate", str(config), "What?", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err.endswith("run: no tuned model there; this is the base model\n")
    assert "--seed" in complaint(capsys, "generate", "What?", "--model", model, "--seed", -1)
    message = complaint(capsys, "generate", "What?", "--model", model, "--max-new-tokens", 512)
    assert "lower --max-new-tokens 512" in message
    assert "too long" in complaint(capsys, "generate", "What? " * 300, "--model", model)
    assert "no such file" in complaint(capsys, "generate", "What?", "--model", template / "none")


def test_many_questions_are_answered_by_one_load(template, capsys, monkeypatch):
    model = str(template / "model")
    options = ["--model", model, "--max-new-tokens", "3", "--dtype", "bfloat16"]
    single = []
    for question in ("What is x=1?", "Why?"):
        assert main(["generate", question, *options]) == 0
        single.append(capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is x=1?\n\n  Why?\n")))
    loads = []

    def load(*args, **settings):
        loads.append(args)
        return load_pretrained(*args, **settings)

    monkeypatch.setattr(generate_module, "load_pretrained", load)
    assert main(["generate", "--questions", "-", *options]) == 0
    assert capsys.readouterr().out == f"> What is x=1?\n{single[0]}> Why?\n{single[1]}"
    assert len(loads) == 1 and loads[0][1] == "bfloat16"


CONTROLS = "\x1b]0;owned\x07\x1b[2Jx\x9b31m\u202e"


def test_what_a_terminal_would_obey_is_made_visible(folder, template, capsys, monkeypatch):
    """From ids and columns, from names on the command line, and from what a model writes."""
    write(folder, [ROW, {**OTHER, "id": "b" + CONTROLS, "answer": ""}])
    for override in (
        [],
        ["data.question=" + CONTROLS],
        [f"data.path={folder}/{CONTROLS}"],
        ["methods=[" + CONTROLS[1:3] + "\n]"],
        [CONTROLS + "=1"],
    ):
        message = complaint(capsys, "check", folder / "config.yaml", *override)
        assert not set(message) & set("\x1b\x07\x9b\u202e\n")
    long = {**ROW, "id": "long" + CONTROLS, "answer": "word " * 90}
    write(folder, [ROW, long, OTHER, {**OTHER, "id": "test", "split": "test"}])
    assert main(["check", str(folder / "config.yaml"), "train.batch_size=2"]) == 0
    out = capsys.readouterr().out
    assert "long␛]0;owned␇␛[2Jx" in out and not set(out) & set("\x1b\x07\x9b\u202e")
    monkeypatch.setattr("raft_jax.models.tokenizer.Tokenizer.decode", lambda *_: CONTROLS)
    model = ["--model", str(template / "model")]
    assert main(["generate", "Why?", *model, *model, "--max-new-tokens", "1"]) == 0
    out = capsys.readouterr().out
    assert "␛]0;owned␇␛[2Jx" in out and not set(out) & set("\x1b\x07\x9b\u202e")


@pytest.mark.parametrize("name", ["data.jsonl", "general.jsonl", "config.yaml"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "unreadable"])
def test_pipes_folders_and_unreadable_files_are_a_line(folder, capsys, monkeypatch, name, kind):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:  # as for another user's file; the tests may be run by one who may read everything
        path.write_bytes(content)
        whole = Path.open

        def refuse(self, *args, **settings):
            if self == path:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
            return whole(self, *args, **settings)

        monkeypatch.setattr(Path, "open", refuse)
    message = complaint(capsys, "check", folder / "config.yaml")
    assert str(path) in message


def test_a_run_folder_that_cannot_be_written_is_a_line(folder, capsys, monkeypatch):
    (folder / "run").write_text("")
    assert "cannot be used as run folder" in complaint(capsys, "refine", folder / "config.yaml")
    (folder / "run").unlink()

    def refuse(path, text):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("raft_jax.run_folder.write_atomically", refuse)
    message = complaint(capsys, "refine", folder / "config.yaml")
    assert message == f"{folder}/run/date: Read-only file system (EROFS)"


def test_help_and_version_answer(capsys):
    verbs = ("run", "refine", "train", "evaluate", "export", "report", "generate", "check")
    for arguments, words in (
        (["--help"], verbs),
        (["run", "--help"], ("key.path=value", "--traceback")),
        (["--version"], ("raft-jax 0.",)),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        out = capsys.readouterr().out
        assert caught.value.code == 0 and all(word in out for word in words)


def test_the_program_exits_with_the_code_and_one_line(folder):
    done = subprocess.run(
        [sys.executable, "-m", "raft_jax", "check", str(folder / "none.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"raft-jax: error: {folder}/none.yaml: no such file; configs/ holds examples\n"


# --- progress ---


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_lines_with_speed_and_time_left(clock, capsys):
    with progress("train raft", 10, "steps") as bar:
        for step in range(10):
            clock[0] += 4
            bar.advance(note=f"SFT {step}")
    assert capsys.readouterr().out.splitlines() == [
        "train raft: 0/10 steps",
        "train raft: 3/10 steps, 0.25/s, 0:28 left, SFT 2",
        "train raft: 6/10 steps, 0.25/s, 0:16 left, SFT 5",
        "train raft: 9/10 steps, 0.25/s, 0:04 left, SFT 8",
        "train raft: 10/10 steps, 0.25/s, SFT 9",
    ]


def test_the_speed_is_that_of_this_process(clock, capsys):
    with progress("rewrite", 1000, "rows", done=900) as bar:
        clock[0] += 20
        bar.advance(0)
        clock[0] += 180
        bar.advance(2)
    assert capsys.readouterr().out.splitlines() == [
        "rewrite: 900/1000 rows",
        "rewrite: 900/1000 rows, 0.00/s",
        "rewrite: 902/1000 rows, 0.01/s, 163:20 left",
    ]


def test_what_was_done_before_is_not_announced(capsys):
    with progress("rewrite", 5, "rows", done=5):
        pass
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("train raft", 3, "steps") as bar:
        bar.advance(2, note="SFT 2.5")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "train raft" in shown and "2/3" in shown and "SFT 2.5" in shown and "\x1b[" in terminal.getvalue()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            2,
            "error: No space left on device; free some, and the same",
        ),
        (
            ValueError("RESOURCE_EXHAUSTED: Error writing (No space left on device)"),
            2,
            "error: No space left on device;",
        ),
        (KeyboardInterrupt(), 130, "raft-jax: stopped; the same command goes on from here"),
        (KeyboardInterrupt("stopped by SIGTERM"), 130, "raft-jax: stopped by SIGTERM\n"),
    ],
    ids=repr,
)
def test_a_full_disk_and_a_stop_are_a_line(folder, capsys, monkeypatch, error, code, words):
    def fails(*_):
        raise error

    monkeypatch.setattr("raft_jax.report.write_report", fails)
    assert main(["report", str(folder / "config.yaml")]) == code
    assert words in capsys.readouterr().err


def test_other_errors_keep_their_traceback(folder, monkeypatch):
    monkeypatch.setattr("raft_jax.report.write_report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["report", str(folder / "config.yaml")])
