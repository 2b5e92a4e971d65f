"""Shares of a step's parts: from traces written out by hand in the forms of each platform, and from a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
from jax.profiler import ProfileData

from raft_jax.config import TrainConfig
from raft_jax.errors import InputError
from raft_jax.train.compiled import CompiledFunction
from raft_jax.train.profile import Profile, operations, shares_of

STEP = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %tanh.1 = f32[8]{0} tanh(%p), metadata={op_name="jit(step)/transpose(jvp(student))/while/body/tanh"}
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %fusion.7 = f32[8]{0:T(256)} fusion(%arg), kind=kLoop, calls=%fused
  ROOT %copy.3 = (s32[], f32[8]{0}) tuple(%arg, %fusion.7), metadata={op_name="jit(step)/jvp(losses)/teacher/mul"}
}

ENTRY %main.9 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), metadata={op_name="state.params[\\'student\\']"}
  %while.2 = (s32[], f32[8]{0}) while(%x), body=%body, metadata={op_name="jit(step)/jvp(student)/while"}
  ROOT %exp.4 = f32[8]{0} exponential(%while.2), metadata={op_name="jit(step)/optimizer/exp"}
}
"""
SAMPLE = """HloModule jit_sample

ENTRY %main (x: f32[8]) -> f32[8] {
  %sine.1 = f32[8]{0} sine(%x), metadata={op_name="jit(sample)/rollout/sin"}
  ROOT %exp.4 = f32[8]{0} copy(%sine.1)
}
"""


def test_every_operation_has_the_part_it_is_of():
    found = operations(STEP)
    assert {name: found["jit_step", name] for name in ("tanh.1", "fusion.7", "copy.3", "while.2", "exp.4")} == {
        "tanh.1": "student",
        "fusion.7": "student",  # as what it calls
        "copy.3": "teacher",  # the innermost
        "while.2": None,
        "exp.4": "optimizer",
    }
    # A program with one part: what says nothing is of it too.
    assert operations(SAMPLE)["jit_sample", "exp.4"] == "rollout"


def write_trace(path: Path, planes: dict[str, dict[str, list[tuple]]]) -> Path:
    """planes: name → line → (name, start and duration in ms, stats)."""
    text = ""
    for plane, lines in planes.items():
        names: dict[str, int] = {}
        stat_names: dict[str, int] = {}
        body = ""
        for line, events in lines.items():
            body += f'lines {{ name: "{line}" timestamp_ns: 0\n'
            for name, start, duration, stats in events:
                body += f"events {{ metadata_id: {names.setdefault(name, len(names) + 1)} "
                body += f"offset_ps: {int(start * 1e9)} duration_ps: {int(duration * 1e9)} "
                for key, value in stats.items():
                    kind = f'str_value: "{value}"' if isinstance(value, str) else f"int64_value: {value}"
                    body += f"stats {{ metadata_id: {stat_names.setdefault(key, len(stat_names) + 1)} {kind} }} "
                body += "}\n"
            body += "}\n"
        for field, table in (("event_metadata", names), ("stat_metadata", stat_names)):
            for name, number in table.items():
                body += f'{field} {{ key: {number} value {{ id: {number} name: "{name}" }} }}\n'
        text += f'planes {{ name: "{plane}"\n{body}}}\n'
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    return path


def on(module, operation, **others):
    return {"hlo_module": module, "hlo_op": operation, **others}


def test_shares_on_a_cpu(tmp_path):
    """10 ms, of which 8 are busy; two operations at once for 2 ms of them."""
    one = [
        ("while.2", 0, 6, on("jit_step", "while.2", device_ordinal=0)),
        ("fusion.7", 0, 4, on("jit_step", "fusion.7", device_ordinal=0)),
        ("exp.4", 6, 2, on("jit_step", "exp.4", device_ordinal=0)),
        ("ThunkExecutor::Execute", 0, 9, {}),
    ]
    two = [
        ("copy.3", 2, 2, on("jit_step", "copy.3", device_ordinal=0)),
        ("sine.1", 4, 2, on("jit_sample", "sine.1", device_ordinal=0)),
    ]
    trace = write_trace(tmp_path / "a.xplane.pb", {"/host:CPU": {"a": one, "b": two}, "/host:metadata": {}})
    found = shares_of(trace, [STEP, SAMPLE], 0.010)
    expected = {"rollout": 2, "student": 4, "teacher": 2, "optimizer": 2}  # of 10 ms of operations in 8 ms
    assert found == pytest.approx({name: 0.8 * time / 10 for name, time in expected.items()} | {"idle": 0.2}, abs=1e-4)


def test_shares_on_two_devices_of_a_tpu_and_of_a_gpu(tmp_path):
    """A mean over devices; an operation's program is the one that runs then, as both have an exp.4."""

    def tpu(late):
        modules = [("jit_sample(77)", 0, 4, {}), ("jit_step(99)", 4, 6 - late, {})]
        ops = [
            ("%exp.4 = f32[8]{0} copy(%sine.1)", 0, 4, {}),
            ("%while.2 = (s32[]) while()", 4, 4, {}),
            ("%fusion.7 = f32[8] fusion(%x)", 4, 4, {}),
            ("%exp.4 = f32[8]{0} exponential(%y)", 8, 2 - late, {}),
        ]
        return {"XLA Modules": modules, "XLA Ops": ops, "Async XLA Ops": [("%copy-start = f32[8] copy", 0, 10, {})]}

    planes = {"/device:TPU:0": tpu(0), "/device:TPU:1": tpu(1), "/host:CPU": {"python": [("train", 0, 10, {})]}}
    found = shares_of(write_trace(tmp_path / "a.xplane.pb", planes), [STEP, SAMPLE], 0.010)
    assert found == pytest.approx({"rollout": 0.4, "student": 0.4, "optimizer": 0.15, "idle": 0.05}, abs=1e-4)
    stream = [
        ("copy_kernel", 0, 4, on("jit_sample", "exp.4")),
        ("fusion_7", 4, 4, on("jit_step", "fusion.7")),
        ("nccl", 8, 1, on("jit_step", "all-reduce")),
        ("evaluation", 20, 50, on("jit_evaluation", "fusion.7")),
    ]
    planes = {"/device:GPU:0": {"Stream #13(Compute)": stream}}
    found = shares_of(write_trace(tmp_path / "b.xplane.pb", planes), [STEP, SAMPLE], 0.010)
    assert found == pytest.approx({"rollout": 0.4, "student": 0.4, "other": 0.1, "idle": 0.1}, abs=1e-4)


def test_steps_that_are_done_are_not_profiled_and_it_says_so(tmp_path, capsys):
    functions: list[CompiledFunction] = []
    Profile([], tmp_path, functions, done=5, num_steps=9)
    Profile([6, 8], tmp_path, functions, done=5, num_steps=9)
    assert capsys.readouterr().out == ""
    Profile([4, 8], tmp_path, functions, done=5, num_steps=9)
    assert "train.profile_steps [4, 8]: 5 steps are done already; only steps 6 to 8" in capsys.readouterr().out
    skipped = Profile([3], tmp_path, functions, done=5, num_steps=9)
    assert "train.profile_steps [3]: 5 steps are done already; nothing is profiled" in capsys.readouterr().out
    with skipped:
        skipped.before(6, None)  # pyright: ignore[reportArgumentType]  # it would be read if it traced
        skipped.after(6, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"train\.profile_steps is \[8, 10\], and the run has 9 steps"):
        Profile([8, 10], tmp_path, functions, done=0, num_steps=9)


@pytest.mark.parametrize("wrong", [[0], [3, 2], [1, 2, 3], [-1, 2]])
def test_steps_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InputError, match=r"train\.profile_steps is .*; allowed: \[\], one step, or the first"):
        TrainConfig(profile_steps=wrong)
    assert TrainConfig(profile_steps=[2, 2]).profile_steps == [2, 2]
