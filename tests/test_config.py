"""The config: strict about names, types and ranges, and each complaint is one line that says what to do."""

import dataclasses
import os
from itertools import pairwise
from pathlib import Path

import pytest

from raft_jax.config_file import load_config, read_saved, to_dict, to_yaml
from raft_jax.errors import InputError
from raft_jax.methods import METHODS
from raft_jax.settings_text import ALIASES, flat

MINIMAL = "run_dir: runs/x\nmodel: {source: a}\ndata: {path: b}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_are_the_papers(write):
    config = load_config(write(MINIMAL))
    train, refine = config.train, config.refine
    assert (refine.threshold, refine.accept) == (0.8, 0.8)
    assert (train.temperature, train.top_k, train.ema_decay, train.fixed_weight) == (1.5, 512, 0.9, None)
    assert (train.epochs, train.batch_size, train.learning_rate, train.weight_decay) == (3, 16, 5e-6, 0.01)
    assert (train.rollout.temperature, train.rollout.top_p, train.reduction) == (1, 1, "sequence")


def test_file_and_overrides_are_merged_and_typed(write):
    path = write(MINIMAL + "train: {learning_rate: 1e-4, epochs: 2}\nmethods: [sft, raft]\n")
    config = load_config(
        path,
        [
            "train.learning_rate=3e-5",
            "data.max_train=null",
            "train.rollout.max_new_tokens=7",
            "refine.judges=[coverage]",
            "train.max_gradient_norm=1",
            "methods=[sdft]",
        ],
    )
    assert config.train.learning_rate == 3e-5 and config.train.epochs == 2.0
    assert config.train.rollout.max_new_tokens == 7 and config.train.rollout.temperature == 1.0
    assert config.methods == ["sdft"] and config.refine.judges == ["coverage"] and config.data.max_train is None
    assert isinstance(config.train.max_gradient_norm, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("trian: {}", (), ("trian", "Did you mean", "train")),
        ("train: {learning_rat: 1}", (), ("learning_rat", "learning_rate")),
        ("", ("train.learning_rat=1",), ("train.learning_rat=1", "learning_rate")),
        ("", ("learning_rate=1",), ("learning_rate=1", "there is train.learning_rate")),
        ("", ("train.lr=1",), ("Key 'lr' is not known; here it is train.learning_rate",)),
        ("lr: 1", (), ("here it is train.learning_rate",)),
        ("train: {lora: {r: 8}}", (), ("here it is train.lora.rank",)),
        ("refine: {tau: 0.5}", (), ("here it is refine.threshold",)),
        ("output_dir: x", (), ("here it is run_dir",)),
        ("", ("lora.rank=1",), ("lora.rank=1", "there is train.lora")),
        ("", ("train.rollout.max_tokens=1",), ("train.rollout.max_tokens=1",)),
        ("train: {batch_size: many}", (), ("train.batch_size", "many")),
        ("", ("train.batch_size=2.5",), ("train.batch_size=2.5",)),
        ("train: 5", (), ("train is a group of settings, got 5",)),
        ("", ("train.rollout=5",), ("train.rollout=5", "rollout is a group of settings")),
        ("", ("train.batch_size",), ("train.batch_size", "key.path=value")),
        ("", ("=5",), ("=5", "key.path=value")),
        ("", ("methods=[raft",), ("methods=[raft",)),
        ("methods: raft", (), ("methods: expected a list",)),
        ("", ("data.path=${oc.env:NONE_SUCH_HERE}",), ("NONE_SUCH_HERE",)),
        ("run_dir: [", (), ("not valid YAML",)),
        ("run_dir: a\n  b: c", (), ("not valid YAML",)),
    ],
)
def test_what_cannot_be_read_is_named(write, text, overrides, words):
    path = write(MINIMAL + text)
    message = complaint(path, *overrides)
    assert all(word in message for word in words), message
    if overrides and "NONE_SUCH_HERE" not in words:
        assert "override" in message and str(path) not in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_size=0", "train.batch_size is 0; allowed: 1 or more"),
        ("train.num_micro_batches=3", "a divisor of train.batch_size 16"),
        ("train.temperature=0", "train.temperature is 0"),
        ("train.learning_rate=-1", "train.learning_rate is -1"),
        ("train.learning_rate=.nan", "train.learning_rate is nan"),
        ("train.ema_decay=1", "train.ema_decay is 1"),
        ("train.reduction=mean", "sequence, token"),
        ("train.fixed_weight=-0.1", "0 or more, or null"),
        ("train.max_steps=0", "train.max_steps is 0"),
        ("train.top_k=0", "1 or more, or null for all tokens"),
        ("train.kl=backward", "forward, reverse"),
        ("train.kl=reverse", "train.kl is 'reverse'; allowed: reverse with train.top_k=null only"),
        ("methods=[sft,repair]", "repair with train.student_init, the model to repair, only"),
        (
            "train={student_init: x/y, lora: {rank: 2}}",
            "train.student_init is 'x/y'; allowed: null with train.lora.rank",
        ),
        ("train.stop_when_cut_share=0", "above 0, up to 1, or null"),
        ("train.keep_best=true", "true with train.eval_every above 0 only"),
        ("train.eval_every=-1", "0 (never) or more"),
        ("train.anchor_weight=-1", "train.anchor_weight is -1"),
        ("fapm.sparsity=1.1", "0 to 1"),
        ("train.epochs=0", "above 0"),
        ("train.schedule=step", "constant, linear, cosine"),
        ("train.final_learning_rate=1", "0 up to train.learning_rate"),
        ("train.warmup_steps=-1", "train.warmup_steps is -1"),
        ("train.weight_decay=-1", "train.weight_decay is -1"),
        ("train.adam_b1=1", "train.adam_b1 is 1"),
        ("train.adam_b2=1.5", "train.adam_b2 is 1.5"),
        ("train.adam_epsilon=0", "train.adam_epsilon is 0"),
        ("train.max_gradient_norm=0", "above 0, or null"),
        ("train.loss_chunk_size=0", "train.loss_chunk_size is 0"),
        ("train.rollout.max_new_tokens=0", "train.rollout.max_new_tokens is 0"),
        ("train.rollout.top_p=0", "above 0, up to 1"),
        ("refine.threshold=1.5", "a cosine, -1 to 1"),
        ("refine.accept=-0.1", "0 to 1"),
        ("refine.rounds=0", "refine.rounds is 0"),
        ("refine.judges=[likeness]", "similarity, coverage, likelihood"),
        ("refine.judges=[]", "similarity, coverage, likelihood"),
        ("refine.max_new_tokens=513", "up to data.max_answer_tokens 512"),
        ("data.held_out=0", "data.held_out is 0"),
        ("data.max_train=0", "or null for all"),
        ("evaluate.batch_size=0", "evaluate.batch_size is 0"),
        ("export.dtype=int8", "float32, bfloat16"),
        ("model.dtype=float16", "float32, bfloat16"),
        ("methods=[rafts]", "raft, raft_unfused, sft, sdft, fused_sft, on_policy, sft_kl, asft, fapm, repair"),
        ("methods=[]", "one or more of"),
        ("methods=[raft,raft]", "each method once"),
        ("seed=-1", "seed is -1"),
        ("train.learning_rate=inf", "train.learning_rate is inf; allowed: a finite number"),
        ("train.weight_decay=nan", "train.weight_decay"),
        ("mesh.data=0", "mesh.data is 0; allowed: 1 or more, or -1"),
        ("mesh.tensor=-2", "mesh.tensor is -2"),
        ("seed=4294967296", "seed is 4294967296"),
    ],
)
def test_values_out_of_range_are_named_with_what_is_allowed(write, override, words):
    message = complaint(write(MINIMAL), override)
    assert words in message and message.startswith("config: "), message


def test_aliases_name_keys_that_are_there(write):
    known = flat(to_dict(load_config(write(MINIMAL))))
    assert set(ALIASES.values()) <= known.keys() and not set(ALIASES) & {key.rpartition(".")[2] for key in known}


def test_missing_values_and_files(write, tmp_path):
    assert "no value for data.path, model.source, run_dir" in complaint(write(""))
    assert "no such file" in complaint(tmp_path / "none.yaml")
    assert "expected a file, found a folder" in complaint(tmp_path)
    assert "not UTF-8" in complaint(write(b"run_dir: \xff\xfe"))
    assert "expected a YAML mapping" in complaint(write("[1, 2]"))
    os.mkfifo(tmp_path / "pipe")
    assert "expected a file, found a named pipe" in complaint(tmp_path / "pipe")
    assert "expected a file, found a device" in complaint(Path("/dev/zero"))


def test_what_is_saved_reads_back_as_the_same(write):
    config = load_config(write(MINIMAL), ["train.fixed_weight=0.1", "refine.judges=[coverage,likelihood]"])
    saved = to_yaml(config)
    assert load_config(write(saved)) == config
    assert read_saved(write(saved)) == flat(to_dict(config))


def test_a_damaged_saved_config_is_named(write, tmp_path):
    for damage in ("run_dir: [", "- 1", "[" * 10_000, "\x00"):
        with pytest.raises(InputError, match=rf"^{tmp_path}/config.yaml: .*the saved config is damaged") as caught:
            read_saved(write(damage))
        assert "\n" not in str(caught.value)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "a: " * 5_000,
        "{" * 3_000,
        "a: &a [*a]",
        "a: &a {b: *a}",
        BOMB,
        "a: *none",
        "\x07",
        "a: !!python/name:os.x",
        "a: 0b",
        "train: {epochs: 2001-99-99}",
        "? [a]\n: b",
        "1: 2",
        "null: 1",
        "- - - a",
        "a: !!binary x",
        'a: "\\ud800"',
        "seed: " + "9" * 5_000,
        "<<: *x",
        "model: null",
        "data: null",
        "methods: null",
        "seed: null",
        "a: ${a}",
        "seed: ${seed}",
        "train: {epochs: ${train.max_steps}, max_steps: ${train.epochs}}",
    ],
)
def test_odd_files_are_a_line(write, text):
    path = write(MINIMAL + text)
    assert len(complaint(path)) < 1000


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:RAFT_SECRET}",
        "x-${oc.env:RAFT_SECRET,none}",
        "${ oc.env : RAFT_SECRET }",
        "${oc.decode:${oc.env:RAFT_SECRET}}",
    ],
)
def test_a_value_of_the_environment_is_never_taken(write, monkeypatch, value):
    monkeypatch.setenv("RAFT_SECRET", "hidden")
    for message in (
        complaint(write(f"{MINIMAL}encoder: {{source: '{value}'}}")),
        complaint(write(MINIMAL), f"encoder.source={value}"),
    ):
        assert value in message and "hidden" not in message


def test_one_setting_may_take_another(write):
    config = load_config(write(MINIMAL + "encoder: {source: '${model.source}/encoder'}"))
    assert config.encoder.source == "a/encoder"


def test_every_method_has_its_preset():
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    load_config(path)
