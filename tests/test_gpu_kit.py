"""benchmarks/gpu on the CPU: that it measures, and what becomes of parts that fail; no number means anything."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KIT = ROOT / "benchmarks" / "gpu"
sys.path.append(str(KIT))
import pack  # noqa: E402
import session  # noqa: E402

FAKES = """
import time

def works(record, tiny):
    record.add("one", value=1)

def breaks(record, tiny):
    record.add("before", value=2)
    raise ValueError("made to fail")

def crashes(record, tiny):
    import os
    print("last words", flush=True)
    os._exit(7)

def hangs(record, tiny):
    record.add("before", value=3)
    print("still here", flush=True)
    time.sleep(600)
"""
# What each part must have measured, as a part of a result's name.
MEASURED = {
    "environment": ("machine", "bf16_product", "copy"),
    "references": ("attention plain float32", "losses raft bfloat16", "losses jsd bfloat16", "decoding bfloat16"),
    "train_step": ("train step float32", "train step float64"),
    "losses": ("raft: raft_jax linear, at once", "raft: naive JAX", "jsd: raft_jax linear", "top-K forward"),
    "decode": ("tiny batch 2 sums", "tiny batch 2 products"),
    "attention": ("raft_jax, plain bfloat16 1 x 32 with backward", "JAX's own bfloat16 1 x 32"),
    "step_smollm2": ("batch 2",),
    "step_1b": ("batch 2",),
    "step_3b": ("batch 2",),
    "step_8b_lora": ("batch 2",),
    "quickstart": ("train sft", "evaluate sft", "steps of sft"),
}
NEED_TORCH_PACKAGES = ("losses_torch", "trl_smollm2", "trl_1b", "trl_3b")


def run(script: str, *arguments, **variables) -> subprocess.CompletedProcess:
    command = [sys.executable, str(KIT / script), *map(str, arguments)]
    given = os.environ | {"JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=given)


def parts_of(out: Path) -> dict:
    return json.loads((out / "session.json").read_text())["parts"]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("rehearsal") / "out"
    done = run("session.py", "--tiny", "--one-process", "--seconds", 3600, "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.mark.slow
def test_every_part_runs_to_its_end(rehearsal):
    parts = parts_of(rehearsal)
    assert list(parts) == [part.name for part in session.PARTS]
    for name, section in parts.items():
        allowed = ("ok", "skipped") if name in NEED_TORCH_PACKAGES else ("ok",)
        assert section["status"] in allowed, (name, section)
        assert section["device"] == "cpu" and "seconds" in section
        if section["status"] == "skipped":
            assert "installed" in section["why"]


@pytest.mark.slow
def test_every_part_has_measured_what_it_is_for(rehearsal):
    parts = parts_of(rehearsal)
    for name, results in MEASURED.items():
        found = parts[name]["results"]
        for result in results:
            measured = [found[key] for key in found if result in key]
            assert measured, (name, result, sorted(found))
            assert all(one.get("status") in (None, "right") for one in measured), (name, result, measured)
    for name, section in parts.items():
        bad = [result for result, found in section["results"].items() if found.get("status") in ("failed", "wrong")]
        assert not bad, (name, bad)


@pytest.mark.slow
def test_what_needs_a_gpu_says_so_and_is_no_pass(rehearsal):
    for name in ("references", "attention"):
        results = parts_of(rehearsal)[name]["results"]
        cudnn = [found for result, found in results.items() if "cudnn" in result.lower()]
        assert cudnn
        for found in cudnn:
            assert found == {"status": "skipped", "why": "cuDNN runs on CUDA devices only"}


@pytest.mark.slow
def test_a_step_has_its_parts_rates_and_memory(rehearsal):
    parts = parts_of(rehearsal)
    for name in ("step_smollm2", "step_8b_lora"):
        found = parts[name]["results"]["batch 2"]
        assert found["parts"].keys() == {"rollout", "teacher", "student"}
        assert all("mfu" in part and part["tflops"] > 0 for part in found["parts"].values() if part["seconds"] > 0)
        assert found["tokens_with_loss"] == 2 * (8 + 8) and found["peak_memory_bytes"] is None  # a CPU does not say
        assert found["metrics_of_last_step"]["sft_loss"] > 0
    assert parts["decode"]["results"]["tiny batch 2 products"]["bandwidth_share"] > 0


def test_operations_are_counted_as_by_hand():
    import shapes

    config = shapes.SHAPES["tiny"]  # L 2, D 32, N 4, K 2, H 8, F 64, V 512
    layer = 32 * 4 * 8 + 2 * 32 * 2 * 8 + 4 * 8 * 32 + 3 * 32 * 64
    assert shapes.causal_pairs(3) == 6 and shapes.causal_pairs(2, before=3) == 9
    assert shapes.forward_flops(config, 10, 7, 3) == 2 * 2 * layer * 10 + 4 * 7 * 4 * 8 * 2 + 2 * 32 * 512 * 3
    assert 1.20e9 < shapes.num_parameters(shapes.SHAPES["llama-1b"]) < 1.25e9
    assert 3.18e9 < shapes.num_parameters(shapes.SHAPES["llama-3b"]) < 3.24e9
    assert 8.0e9 < shapes.num_parameters(shapes.SHAPES["llama-8b"]) < 8.1e9
    assert 1.34e8 < shapes.num_parameters(shapes.SHAPES["smollm2"]) < 1.35e8


def test_a_part_that_fails_crashes_or_hangs_stops_no_other(tmp_path):
    """Each in a process of its own, which is what the others are saved by."""
    (tmp_path / "fakes.py").write_text(FAKES)
    out = tmp_path / "out"
    extra = [
        f"{name}:{limit}:fakes:{name}"
        for name, limit in (("breaks", 300), ("crashes", 300), ("hangs", 20), ("works", 300))
    ]
    done = run(
        "session.py", "--parts", "", "--out", out, *(f"--extra={part}" for part in extra), PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    parts = parts_of(out)
    assert {name: section["status"] for name, section in parts.items()} == {
        "breaks": "failed",
        "crashes": "failed",
        "hangs": "cut off",
        "works": "ok",
    }
    assert parts["works"]["results"] == {"one": {"value": 1}}
    assert parts["breaks"]["results"] == {"before": {"value": 2}} and "made to fail" in parts["breaks"]["why"]
    assert "Traceback" in parts["breaks"]["output_tail"]
    assert parts["crashes"]["exit"] == 7 and "last words" in parts["crashes"]["output_tail"]
    assert parts["hangs"]["results"] == {"before": {"value": 3}} and "still here" in parts["hangs"]["output_tail"]
    assert parts["hangs"]["limit"] == 20 and "20 s" in parts["hangs"]["why"]


def test_when_the_time_is_spent_the_rest_is_recorded_as_not_run(tmp_path):
    out = tmp_path / "out"
    done = run("session.py", "--parts", "environment,decode", "--seconds", 0.5, "--out", out)
    assert done.returncode == 0, done.stderr
    assert {name: section["status"] for name, section in parts_of(out).items()} == {
        "environment": "not run",
        "decode": "not run",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "decoding"), "--parts decoding is not known; use some of environment,"),
        (("--seconds", "0"), "--seconds 0 must be above 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit):
        session.parse(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


@pytest.fixture
def no_index(monkeypatch):
    """pip's place taken: a wheel a package, so large that the sizes can be told apart."""

    def fetch(packages, folder):
        made = [folder / f"{package.partition('==')[0]}-1.0-py3-none-any.whl" for package in packages]
        for wheel in made:
            wheel.write_bytes(b"w" * 1000)
        return made

    monkeypatch.setattr(pack, "fetch_wheels", fetch)


def test_packing_halves_the_weight_and_keeps_every_byte(tmp_path, no_index, capsys):
    model, rows, out = tmp_path / "model.gguf", tmp_path / "rows.jsonl", tmp_path / "packed"
    model.write_bytes(bytes(range(256)) * 400)
    rows.write_text('{"question": "?"}\n')
    given = ["--model", str(model), "--rows", str(rows), "--out", str(out)]
    assert pack.main([*given, "--dry-run"]) == 0 and not out.exists()
    printed = capsys.readouterr().out
    assert "first in all" in printed and "wheels/gguf-1.0-py3-none-any.whl" in printed
    pack.main(given)
    sizes = {
        name: sum(path.stat().st_size for path in (out / name).rglob("*") if path.is_file())
        for name in ("first", "second")
    }
    assert abs(sizes["first"] - sizes["second"]) < 500  # model.json
    joined = b"".join((out / name / pack.model_part(name)).read_bytes() for name in ("first", "second"))
    assert joined == model.read_bytes()
    assert json.loads((out / "first" / "model.json").read_text())["bytes"] == len(joined)


def test_a_part_that_is_too_large_to_travel_is_refused(tmp_path, no_index, monkeypatch):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"m" * 100_000)
    monkeypatch.setattr(pack, "PART_BYTES", 50_000)
    with pytest.raises(SystemExit, match="limit; take packages out of"):
        pack.main(["--model", str(model), "--out", str(tmp_path / "packed")])


def test_no_address_is_in_any_file_of_the_kit():
    for path in [*KIT.glob("*"), *(ROOT / "benchmarks" / "results").glob("*")]:
        if path.is_file():
            assert "://" not in path.read_text("utf-8").replace("package://", ""), path


def test_a_comparison_that_is_cut_off_keeps_its_finished_cells(tmp_path):
    out = tmp_path / "out"
    path = out / "compare.json"
    command = [sys.executable, str(KIT / "compare.py"), "--tiny", "--seconds", "3600", "--out", str(out)]
    process = subprocess.Popen(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and (not path.exists() or not json.loads(path.read_text())["cells"]):
            time.sleep(0.2)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    content = json.loads(path.read_text())
    assert content["device"] == "cpu" and content["base"]["gold_nll"] > 0
    assert content["cells"][0].keys() >= {"method", "learning_rate", "seed", "gold_nll", "divergence", "seconds"}


def test_the_most_informative_cells_come_first():
    import compare

    cells = compare.cells()
    assert len(cells) == len(set(cells)) == 45
    first = cells[:6]
    assert {cell.method for cell in first} == {"sft", "raft"} and {cell.seed for cell in first} == {0}
    assert {cell.learning_rate for cell in first} == set(compare.LEARNING_RATES)
    assert {cell.method for cell in cells[:15]} == set(sum(compare.METHODS, ()))
