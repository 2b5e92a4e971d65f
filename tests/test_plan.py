"""The plan of a run: operations and bytes against hand counts, what does not fit, JSON, and errors in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import tiny
import yaml

from raft_jax.accelerators import find_accelerator
from raft_jax.cli import main
from raft_jax.config import LoraConfig
from raft_jax.config_file import load_config
from raft_jax.methods import METHODS
from raft_jax.plan import measure as measuring
from raft_jax.plan.chips import Chip, Slice, chip_of, find_slice
from raft_jax.plan.facts import Facts
from raft_jax.plan.flops import Flops, RowTokens
from raft_jax.plan.gpus import TARGETS
from raft_jax.plan.hlo import Module
from raft_jax.plan.measure import Measure
from raft_jax.plan.phases import Reading
from raft_jax.plan.plan import look_further, make_plan
from raft_jax.plan.text import tables_of, verdict_of

ROOT = Path(__file__).parents[1]
L, D, N, K, H, F, V = 2, 32, 4, 2, 16, 64, 250  # the sizes of HF
HF = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "intermediate_size": F,
    "max_position_embeddings": 4096,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# Query, key, value, output; gate, up, down.
LAYER = D * N * H + 2 * D * K * H + N * H * D + 3 * D * F
PARAMETERS = L * (LAYER + 2 * D) + D + 2 * V * D
LARGE = HF | {  # Llama 3's 70B
    "vocab_size": 128256,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 28672,
}
# Prompts of 16 and 64 for a template, answers of 8, and the teacher sees 30 more and the answer; rounded up to 8.
PROMPT, ANSWER, TEACHER, ROLLOUT = 16 + 64, 8, 16 + 64 + 30 + 8, 8


def write_config(folder: Path, hf=HF, **changes) -> Path:
    """A config for a model of which there is a config.json alone, and without data."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(hf))
    config = {
        "run_dir": str(folder / "run"),
        "methods": ["raft"],
        "model": {"source": str(folder / "model")},
        "data": {"path": str(folder / "none.jsonl"), "max_question_tokens": 16, "max_answer_tokens": 8},
        "refine": {"batch_size": 4},
        "train": {"batch_size": 4, "rollout": {"max_new_tokens": ROLLOUT}},
        "evaluate": {"max_new_tokens": 8, "general_new_tokens": 4, "batch_size": 4},
        "mesh": {"data": 1},
    }
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def seen_pairs(start: int, count: int, window: int | None = None) -> int:
    """Pairs of query and key, one by one."""
    return sum(
        1 for query in range(start, start + count) for key in range(query + 1) if window is None or query - key < window
    )


def decoder_of(**changes):
    return tiny.make_config(V, num_layers=L, width=D, num_heads=N, num_kv_heads=K, head_width=H, ffn_width=F, **changes)


@pytest.mark.parametrize("windows", [None, (3, 5), (4096, 2)])
def test_attention_by_counting_pairs(windows):
    flops = Flops(decoder_of(windows=windows))
    for start, count in ((0, 7), (4, 5), (9, 1), (3, 0)):
        pairs = sum(seen_pairs(start, count, window) for window in windows or (None, None))
        assert flops.attention(start, count) == 2 * 2 * N * H * pairs


def matrices(tokens: float) -> float:
    """Operations of the layers' matrices for some tokens."""
    return 2 * L * LAYER * tokens


def scores(start: int, count: int) -> float:
    return L * 4 * N * H * seen_pairs(start, count)


def step_by_hand(P: int, A: int, C: int, T: int, *, passes: int, head_passes: int) -> float:
    """RAFT's train step of one row: the student's passes over prompt, answer and rollout, and the teacher's pass."""
    student = passes * matrices(P + A + C) + head_passes * 2 * V * D * (A + C)
    teacher = matrices(T + C) + scores(0, T + C) + 2 * V * D * C
    attended = scores(0, P) + scores(P, A) + scores(P, C)
    return student + (passes if head_passes == 3 else passes + 1) * attended + teacher


def test_operations_of_a_step_by_hand():
    row, raft = RowTokens(10, 6, 21, 4), METHODS["raft"]
    flops = Flops(decoder_of())
    assert flops.train(row, raft) == step_by_hand(10, 6, 4, 21, passes=3, head_passes=3)
    assert flops.train(row, raft, remat=True) == step_by_hand(10, 6, 4, 21, passes=4, head_passes=3)
    # Of frozen weights there is no gradient. Adapters of the queries: three passes over a and b in both layers.
    lora = Flops(decoder_of(), LoraConfig(rank=2, targets=["q_proj"]))
    adapters = 3 * 2 * L * 2 * (D + N * H) * (10 + 6 + 4)
    assert lora.train(row, raft) == step_by_hand(10, 6, 4, 21, passes=2, head_passes=2) + adapters
    sft = 3 * (matrices(16) + scores(0, 10) + scores(10, 6) + 2 * V * D * 6)
    assert flops.train(row, METHODS["sft"]) == sft
    reads_too = matrices(16) + scores(0, 16) + 2 * V * D * 6
    assert flops.train(row, METHODS["sft_kl"]) == sft + reads_too
    repair = step_by_hand(10, 0, 4, 21, passes=3, head_passes=3)
    assert flops.train(row, METHODS["repair"]) == repair


def test_operations_of_generation_by_hand():
    """Six tokens from a prompt of ten: the prompt is read, and five of them, each with all before it."""
    assert Flops(decoder_of()).generate(10, 6) == matrices(15) + scores(0, 15) + 2 * V * D * 6


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan on one CPU device, whose programs are really compiled."""
    path = write_config(tmp_path_factory.mktemp("planned"))
    return make_plan(load_config(path), find_slice("local"), lambda text: None, rows=40, price=3.0)


def test_bytes_and_operations_of_a_plan_by_hand(planned):
    found = planned.as_json()
    assert [phase["name"] for phase in found["phases"]] == ["refine", "rollout", "train raft", "evaluate"]
    refine, rollout, train, evaluate = found["phases"]
    assert found["num_parameters"] == PARAMETERS
    assert train["bytes"]["parameters"] == train["bytes"]["teacher"] == 4 * PARAMETERS
    scalars = train["bytes"]["optimiser"] - 2 * 4 * PARAMETERS
    assert 0 < scalars < 64  # counters and λ's averages
    assert rollout["bytes"]["cache"] == 2 * L * 4 * K * H * (PROMPT + ROLLOUT) * 4
    for phase in found["phases"]:
        assert phase["total_bytes"] == pytest.approx(sum(phase["bytes"].values()))
        assert phase["fits"] and phase["collective_bytes"] == {} and phase["seconds"]["interconnect"] == 0
    assert train["bytes"]["activations"] > 4 * PARAMETERS  # a gradient of each weight among them
    # The process; and a checkpoint is a copy of the state, and as much again while it is written.
    process = 0.6e9 / len(jax.devices())
    assert refine["bytes"]["host"] == evaluate["bytes"]["host"] == process
    assert train["bytes"]["host"] == rollout["bytes"]["host"] == process + 2 * (3 * 4 * PARAMETERS + scalars)
    # Every array of training is an argument of the step.
    assert train["compiler_bytes"] == pytest.approx(train["total_bytes"] - train["bytes"]["host"])
    beside = sum(train["bytes"][name] for name in ("teacher", "optimiser", "host"))
    assert rollout["total_bytes"] - rollout["compiler_bytes"] == pytest.approx(beside)
    assert evaluate["total_bytes"] - evaluate["compiler_bytes"] == pytest.approx(process + 4 * PARAMETERS)
    assert train["flops"] == 4 * step_by_hand(PROMPT, ANSWER, ROLLOUT, TEACHER, passes=3, head_passes=3)
    assert rollout["flops"] == 4 * (matrices(PROMPT + 7) + scores(0, PROMPT + 7) + 2 * V * D * ROLLOUT)
    # 40 rows: 10 steps in each of 3 epochs; rewritings and three fusions of each, four at once.
    assert train["runs"] == rollout["runs"] == 30 and refine["runs"] == 40
    seconds = sum(phase["runs"] * max(phase["seconds"].values()) for phase in found["phases"])
    assert found["at_least"] == pytest.approx(
        {"hours": seconds / 3600, "chip_hours": seconds / 3600, "cost_usd": 3 * seconds / 3600}
    )
    assert found["by_the_compiler"]["hours"] is None  # only the TPU's compiler estimates cycles


def test_lines(planned):
    lines = [*tables_of(planned), *verdict_of(planned)]
    assert any("limits are taken for every row" in line for line in lines)
    assert any(line.startswith("fits: at most") for line in lines) and any("USD" in line for line in lines)
    assert all("\n" not in line for line in lines)


def fake_chips(num: int = 8, memory: float = 16e9, link: float = 90e9) -> Slice:
    """CPU devices that are said to be a TPU's."""
    devices = jax.devices()[:num]
    chip = replace(chip_of(devices), kind="TPU v5 lite", memory=memory, flops=2e14, bandwidth=8e11, link=link)
    return Slice("v5e:2x4", devices, chip)


@pytest.fixture
def read_instead(monkeypatch):
    """Nothing is compiled: train steps take some bytes for each row, and all programs send some."""
    taken = []

    def read(programs, lower, num_steps=1, per_row=1e9, sent=0.0):
        taken.append(programs)
        taken_by_rows = per_row * programs.num_rows if num_steps == 1 else 0.0
        total = measuring.bytes_per_device((programs.state, programs.params)) + taken_by_rows
        return Reading(total, taken_by_rows, {"all-gather": sent} if sent else {}, busy=3e9)

    def use(**settings):
        monkeypatch.setattr(measuring, "compile_and_read", lambda *given: read(*given, **settings))
        return taken

    return use


def test_the_largest_batch(tmp_path, read_instead):
    """2 rows on each chip take 2 GB, 4 take 4: 15 fit into 15.9 GB. The cache is next to nothing."""
    read_instead()
    path = write_config(tmp_path, train={"batch_size": 16}, mesh={"data": 1, "fsdp": 8})
    plan = make_plan(load_config(path), fake_chips(memory=15.9e9), lambda text: None)
    look_further(plan)
    assert plan.largest is not None and plan.largest.rows == 8 * 15 and "16 and 32 rows" in plan.largest.how
    assert plan.fits and not plan.tried
    cores = fake_chips()
    cores = replace(cores, chip=replace(cores.chip, devices=2))  # as a TPU7x's
    assert Measure(plan.measure.facts, cores, lambda text: None).num_chips == 4


def test_seventy_billion_parameters_do_not_fit(tmp_path, read_instead):
    """Float32 masters and two moments, and a bfloat16 teacher: 14 bytes a parameter, over 8 chips."""
    compiled = read_instead()
    path = write_config(
        tmp_path, LARGE, train={"batch_size": 8}, mesh={"data": 1, "fsdp": 8}, model={"dtype": "bfloat16"}
    )
    config, told = load_config(path), []
    plan = make_plan(config, fake_chips(), told.append)
    look_further(plan)
    assert not compiled and plan.fits is False and plan.hours is None and plan.largest is None
    step = next(phase for phase in plan.phases if phase.name == "train raft")
    parameters = (
        80 * (2 * 8192 * 64 * 128 + 2 * 8192 * 8 * 128 + 3 * 8192 * 28672 + 2 * 8192) + 8192 + 2 * 128256 * 8192
    )
    assert step.total == pytest.approx(14 * parameters / 8, rel=0.01)
    assert [tried.change for tried in plan.tried][:1] == ["train.lora.rank=16"]
    assert plan.tried[0].fits is False and "not compiled" in plan.tried[0].note  # 17.6 GB of teacher alone
    assert any(line.startswith("does not fit: ") for line in verdict_of(plan))
    # Chips of 44 GB have room for two models of 17.6 GB with adapters; with `quick` that is not compiled.
    plan = make_plan(config, fake_chips(memory=44e9), told.append)
    before = len(compiled)
    look_further(plan, quick=True)
    assert len(compiled) == before and plan.tried[0].fits is None and plan.tried[0].total < 44e9


def test_what_does_not_fit_is_tried_with_less(tmp_path, read_instead):
    read_instead(per_row=1e9)
    path = write_config(tmp_path, train={"batch_size": 64}, mesh={"data": 1, "fsdp": 8})
    told = []
    plan = make_plan(load_config(path), fake_chips(memory=6e9), told.append)
    look_further(plan)
    assert plan.fits is False
    found = {tried.change: tried for tried in plan.tried}
    assert list(found) == [
        "model.remat=true",
        "train.loss_chunk_size=128",
        "train.num_micro_batches=2",
        "train.lora.rank=16",
    ]
    # Micro-batches of half the rows: four on each chip.
    assert found["train.num_micro_batches=2"].fits and not found["model.remat=true"].fits
    assert sum("trying" in text for text in told) == 4
    assert plan.largest is not None and plan.largest.rows == 8 * 5
    printed = list(verdict_of(plan))
    assert any("train.num_micro_batches=2: fits, 4.00 GB" in line for line in printed)


def test_other_meshes_are_tried_where_chips_wait_for_each_other(tmp_path, read_instead):
    read_instead(per_row=1e6, sent=9e9)
    hf = HF | {"num_key_value_heads": 4}
    path = write_config(tmp_path, hf, train={"batch_size": 8}, mesh={"data": 1, "fsdp": 8})
    plan = make_plan(load_config(path), fake_chips(), lambda text: None)
    look_further(plan)
    assert plan.fits and {phase.slowest for phase in plan.phases} == {"interconnect"}
    assert [tried.change for tried in plan.tried] == [
        "mesh.data=1 mesh.fsdp=2 mesh.tensor=4",
        "mesh.data=1 mesh.fsdp=1 mesh.tensor=8",
    ]
    assert plan.tried[0].seconds == plan.tried[0].before == pytest.approx(0.2)
    # Two seconds at 1.5 GHz, and 9 GB at 90 GB/s after them.
    assert {phase.estimated(1.5e9) for phase in plan.phases} == {2.1} and plan.phases[0].estimated(None) is None
    # Four key/value heads do not divide over eight.
    assert plan.tried[1].fits is None and "set mesh.tensor" in plan.tried[1].note


def test_what_the_compiler_refuses(monkeypatch, tmp_path):
    class Lowered:
        def compile(self):
            raise RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm.")

    measure = Measure(Facts.of(load_config(write_config(tmp_path))), fake_chips(1), lambda text: None)
    programs = measure.programs(METHODS["raft"])
    monkeypatch.setattr(type(programs), "step", lambda self, method: Lowered())
    step = measure.step(METHODS["raft"])
    assert step.reading is not None and step.reading.refused
    assert step.total == 17.5 * 2**30 and step.fits(64e9) is False and step.seconds["interconnect"] == 0


def test_lengths_of_the_data(tmp_path):
    """With a tokenizer and data, rows are as long as those that training gets."""
    facts = Facts.of(load_config(tiny.write_run(tmp_path)))
    measure = Measure(facts, find_slice("local"), lambda text: None)
    assert facts.data is not None and facts.num_train == 12 and facts.num_test == 4 and facts.num_general == 3
    rows = facts.data.tokens(facts.data.gold, METHODS["raft"])
    sides = measure.programs(METHODS["raft"]).sides
    assert [side.length for side in (sides.prompt, sides.answer, sides.teacher_prompt)] == [
        -(-max(len(getattr(row, name)) for row in rows) // 8) * 8 for name in ("prompt", "answer", "teacher_prompt")
    ]
    assert 0 < sides.answer.share < 1 and sides.prompt.shared > 0
    assert facts.row_tokens(METHODS["raft"]).answer == sum(len(row.answer) for row in rows) / 12


def test_json_is_all_that_is_printed(tmp_path, capsys, read_instead):
    read_instead(per_row=1e6)
    path = write_config(tmp_path)
    assert main(["plan", str(path), "--json", "--rows", "8"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["topology"] == "local" and found["fits"] and found["phases"][0]["name"] == "refine"
    assert "plan: compiling" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--price", "0"], ("--price 0", "above 0")),
        (["--rows", "-3"], ("--rows -3",)),
        (["--memory", "nan"], ("--memory nan",)),
        (["mesh.fsdp=64"], ("mesh.fsdp", "device(s)")),
        (["mesh.fsdp=8"], ("train.batch_size 4", "data×fsdp = 8")),
        (["mesh.tensor=4"], ("kv_heads", "mesh.tensor")),
        (["model.source=nowhere"], ("nowhere", "no such file or folder")),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, words):
    assert main(["plan", str(write_config(tmp_path)), *arguments]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and all(word in err for word in words)


def test_a_folder_without_a_config(tmp_path, capsys):
    path = write_config(tmp_path)
    (tmp_path / "model" / "config.json").unlink()
    assert main(["plan", str(path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["v5e:4x4", "h100x8"])
def test_without_the_compilers_the_extra_is_named(topology, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("raft_jax.plan.environment.find_spec", lambda name: None)
    assert main(["plan", str(write_config(tmp_path)), "--topology", topology]) == 2
    assert "pip install 'raft-jax[plan]'" in capsys.readouterr().err


def test_chips():
    for name, target in TARGETS.items():  # what XLA is told and what times are computed from
        kind, figures = find_accelerator(target.kind)
        assert target.bandwidth == pytest.approx(figures.bandwidth, rel=0.02), name
        assert target.memory == pytest.approx(figures.memory, rel=0.02), name
        device = SimpleNamespace(device_kind=target.kind, platform="gpu", memory_stats=lambda: {"bytes_limit": 7e9})
        assert chip_of([device]) == Chip(kind, 7e9, figures.flops, figures.bandwidth, figures.link)
    assert Slice("h100x2", [], None).larger() == ["h100x4", "h100x8"]
    assert Slice("b200", [], None).larger() == ["b200x2", "b200x4", "b200x8"]
    local = find_slice("local", 5e9)
    assert local.chip.memory == 5e9 and list(local.devices) == jax.devices() and local.larger() == []
    assert fake_chips().larger() == ["v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"]


def test_cycles_without_an_estimate_are_left_out():
    config = 'backend_config={{"window_config":{{}},"estimated_cycles":"{}"}}'
    text = "\n".join(
        [
            "ENTRY %main (a: f32[2]) -> f32[2] {",
            "  %a = f32[2]{0} parameter(0)",
            f"  %b = f32[2]{{0}} negate(%a), {config.format(40)}",
            f"  ROOT %c = f32[2]{{0}} negate(%b), {config.format(2**63 - 1)}",
            "}",
        ]
    )
    assert Module(text).cycles() == 40


@pytest.mark.slow
def test_a_slice_that_is_not_at_hand(tmp_path):
    """The TPU's own compiler, in a process of its own that sets its environment itself."""
    pytest.importorskip("libtpu", reason="the extra [plan] is not installed")
    path = write_config(
        tmp_path,
        HF | {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128},
        mesh={"data": 1, "fsdp": 4},
        model={"dtype": "bfloat16"},
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "XLA_"))}
    command = [sys.executable, "-m", "raft_jax", "plan", str(path), "--topology"]

    def run(*arguments):
        return subprocess.run(
            [*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3600
        )

    done = run("v5e:2x2", "--json", "--quick")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["chips"] == 4 and found["chip"]["kind"] == "TPU v5 lite" and found["fits"]
    assert all(phase["collective_bytes"] for phase in found["phases"])
    unknown = run("v5e:5x5")
    assert unknown.returncode == 2 and "--topology v5e:5x5" in unknown.stderr and unknown.stderr.count("\n") == 1
