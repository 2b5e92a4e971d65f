"""A trace of some training steps by JAX's profiler, and the shares of the devices' time in the parts of a step."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from raft_jax.errors import InputError
from raft_jax.run_folder import write_atomically
from raft_jax.train.compiled import CompiledFunction
from raft_jax.train.step_metrics import StepMetrics

# Names of jax.named_scope in train/step.py and train/rollout.py. A backward pass counts as the part that it is of.
PARTS = ("rollout", "student", "teacher", "losses", "optimizer")
OTHER, IDLE = "other", "idle"  # operations in no part; no operation runs, so that a device waits for the host
CONTAINERS = ("while", "conditional", "call")  # their time is that of the operations in them
MODULES = "XLA Modules"  # the line of a TPU's trace that says which program runs


class Profile:
    """Traces the steps that `train.profile_steps` names, as a context around the training loop.

    The trace is for TensorBoard or Perfetto; `parts.json` beside it has the shares. No other step is under way while a
    trace begins or ends, and neither counts as time of a step.
    """

    def __init__(
        self, steps: Sequence[int], folder: Path, functions: Sequence[CompiledFunction], done: int, num_steps: int
    ):
        """
        Args:
          steps: none, one, or the first and the last one, counted from 1.
          folder: of the trace.
          functions: those whose programs run in a step.
          done, num_steps: the steps that are done already, and those of the whole run.

        Raises:
          InputError: the run has no such step.
        """
        self._folder, self._functions = folder, functions
        self._steps: StepMetrics | None = None  # while a trace is made
        self._first, self._last = (steps[0], steps[-1]) if steps else (0, 0)
        if self._last > num_steps:
            raise InputError(
                f"train.profile_steps is {list(steps)}, and the run has {num_steps} steps; name some of them"
            )
        if steps and self._first <= done:
            left = f"only steps {done + 1} to {self._last} are profiled" if done < self._last else "nothing is profiled"
            print(f"train.profile_steps {list(steps)}: {done} steps are done already; {left}", flush=True)
            self._first = done + 1

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, kind, *_) -> None:
        if self._steps is None:
            return
        if kind is None:
            self._finish(self._steps)
        else:
            jax.profiler.stop_trace()

    def before(self, step: int, steps: StepMetrics) -> None:
        """To be called before a step is dispatched."""
        if step != self._first or step > self._last:
            return
        steps.read()
        for function in self._functions:
            function.called.clear()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._steps, self._seconds_before = steps, steps.total_seconds
        steps.restart()

    def after(self, step: int, steps: StepMetrics) -> None:
        """To be called after the metrics of a step were added."""
        self._newest = step
        if step == self._last and self._steps is not None:
            self._finish(steps)
            steps.restart()

    def _finish(self, steps: StepMetrics) -> None:
        steps.wait()  # its line is not written yet, as more may come into it
        seconds, self._steps = steps.total_seconds - self._seconds_before, None
        jax.profiler.stop_trace()
        traces = self._folder.rglob("*.xplane.pb")
        programs = [program.as_text() for function in self._functions for program in function.called.values()]
        shares = shares_of(max(traces, key=lambda path: path.stat().st_mtime), programs, seconds)
        record = {"steps": [self._first, self._newest], "seconds": round(seconds, 3), "shares": shares}
        write_atomically(self._folder / "parts.json", json.dumps(record, indent=1) + "\n")
        parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        print(
            f"profile of steps {self._first} to {self._newest}, {seconds:.1f} s: {parts} ({self._folder})", flush=True
        )


def shares_of(trace: Path, programs: Iterable[str], seconds: float) -> dict[str, float]:
    """The share of each part in the time of a trace, as a mean over this process's devices; they add up to 1.

    Where a device runs several operations at once, as a CPU does, the time in which any of them runs is divided as
    their own times are.

    Args:
      trace: a file *.xplane.pb.
      programs: the programs of the steps, as HLO text; others, such as those of an evaluation in between, are left out.
        Where two of the same name call different operations by one name, the later one counts.
      seconds: the time of the steps that were traced.
    """
    parts = {name: part for program in programs for name, part in operations(program).items()}
    modules = {module for module, _ in parts}
    times: dict[Any, Counter[str]] = defaultdict(Counter)
    intervals: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for device, module, operation, start, duration in _events(trace):
        part = parts.get((module, operation), OTHER)
        if part is not None and module in modules:
            times[device][part] += duration
            intervals[device].append((start, start + duration))
    shares: Counter[str] = Counter()
    for device, by_part in times.items():
        busy = _union(intervals[device]) / 1e9 / seconds
        shares.update({part: busy * time / by_part.total() / len(times) for part, time in by_part.items()})
    ordered = {part: shares[part] for part in (*PARTS, OTHER) if shares[part]}
    return {part: round(share, 4) for part, share in (ordered | {IDLE: max(1 - shares.total(), 0.0)}).items()}


def _events(trace: Path) -> Iterable[tuple[Any, str, str, float, float]]:
    """(device, program, operation, start, duration), in nanoseconds, of every operation in a trace."""
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        if not plane.name.startswith(("/host:CPU", "/device:")):
            continue
        lines = list(plane.lines)
        modules = [event for line in lines if line.name == MODULES for event in line.events]
        for line in lines:
            for event in line.events if line.name != MODULES else ():
                stats = dict(event.stats)
                if "hlo_op" in stats:  # CPU and GPU
                    device = stats.get("device_ordinal", plane.name)
                    module, operation = stats.get("hlo_module", ""), stats["hlo_op"]
                elif line.name == "XLA Ops":  # TPU: the event's name begins with that of the operation
                    running = (m.name for m in modules if m.start_ns <= event.start_ns < m.start_ns + m.duration_ns)
                    device, module = plane.name, next(running, "").partition("(")[0]
                    operation = re.split(r"[ =]", event.name.removeprefix("%"), maxsplit=1)[0]
                else:
                    continue
                yield device, module, operation, event.start_ns, event.duration_ns


def operations(program: str) -> dict[tuple[str, str], str | None]:
    """The part of every operation in a program, by names of program and operation; None for containers of others.

    An operation that does not say what it is of, such as a fusion or a copy, counts as most of the computation that it
    calls or stands in; and as the program's part, if that has only one.

    Example:
      >>> text = '''HloModule jit_step, is_scheduled=true
      ... %fused (p: f32[2]) -> f32[2] {
      ...   ROOT %sine.1 = f32[2]{0} sine(%p), metadata={op_name="jit(step)/transpose(jvp(student))/sin"}
      ... }
      ... ENTRY %main (x: f32[2]) -> f32[2] {
      ...   %fusion = f32[2]{0} fusion(%x), kind=kLoop, calls=%fused
      ...   ROOT %exp.2 = f32[2]{0} exponential(%fusion), metadata={op_name="jit(step)/losses/exp"}
      ... }'''
      >>> operations(text)["jit_step", "fusion"], operations(text)["jit_step", "exp.2"]
      ('student', 'losses')
    """
    module = re.match(r"HloModule ([^,\s]+)", program)
    assert module is not None
    part_name = re.compile(r"[/(](" + "|".join(PARTS) + r")(?=[/)])")
    # operation → (opcode, computation, computation called, part)
    instructions: dict[str, tuple[str, str, str, str | None]] = {}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    computation = ""
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$", line):
            computation = header[1]
        elif instruction := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = .*?[\]})] ([a-z][a-z0-9\-]*)\(", line):
            path, called = re.search(r'op_name="([^"]*)"', line), re.search(r"calls=%([\w.\-]+)", line)
            parts = part_name.findall(path[1]) if path else []
            part = parts[-1] if parts else None
            counts[computation].update([part] if part else [])
            instructions[instruction[1]] = (instruction[2], computation, called[1] if called else "", part)
    every = Counter[str]()
    for count in counts.values():
        every.update(count)

    def part_of(opcode: str, inside: str, called: str, part: str | None) -> str | None:
        if opcode in CONTAINERS:
            return None
        if len(every) == 1:
            return next(iter(every))
        near = next((counts[name] for name in (called, inside) if counts[name]), None)
        return part or (near.most_common(1)[0][0] if near else OTHER)

    return {(module[1], name): part_of(*values) for name, values in instructions.items()}


def _union(intervals: list[tuple[float, float]]) -> float:
    """The length of what intervals cover together."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return total
