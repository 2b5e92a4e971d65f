"""A run's phases on given chips: programs are lowered, compiled and read, and set beside what the model asks for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property

import jax

from raft_jax.config import Config
from raft_jax.errors import InputError
from raft_jax.methods import METHODS, Method
from raft_jax.plan.chips import CPU, Slice
from raft_jax.plan.facts import INSTRUCTION_TOKENS, Facts
from raft_jax.plan.flops import Flops
from raft_jax.plan.phases import Phase, Reading, Traffic, compile_and_read, seconds_of, tokens_of
from raft_jax.plan.programs import Programs
from raft_jax.sampling.engine import rows_per_batch
from raft_jax.sharding import bytes_per_device, make_mesh

Report = Callable[[str], None]
# On a CPU, beside JAX's arrays: what Python, its libraries and the compiled programs take (measured: 0.5 to 0.7 GB).
PROCESS_BYTES = 0.6e9


class Measure:
    """The phases of one config on one slice."""

    def __init__(self, facts: Facts, chips: Slice, report: Report):
        """
        Args:
          facts: of the run.
          chips: that it would run on.
          report: is told, in a few words, what is compiled next.

        Raises:
          InputError: mesh, batch or model do not divide.
        """
        self.facts, self.slice, self.config, self.say = facts, chips, facts.config, report
        sizes = self.config.mesh
        self.mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices=chips.devices)
        if self.mesh.size < len(chips.devices) and not chips.is_local:
            raise InputError(
                f"mesh data={sizes.data} fsdp={sizes.fsdp} tensor={sizes.tensor} leaves "
                f"{len(chips.devices) - self.mesh.size} of the {len(chips.devices)} devices of {chips.topology} idle; "
                "set mesh.data, mesh.fsdp and mesh.tensor so that they multiply to the number of devices"
            )
        self.flops = Flops(facts.decoder, self.config.train.lora)
        self.programs = cache(self._programs)
        self.programs(self.first_method)  # so that what does not divide is said before anything is compiled

    @property
    def num_chips(self) -> float:
        """Chips that the mesh has."""
        return self.mesh.size / self.slice.chip.devices

    def changed(self, config: Config, chips: Slice | None = None) -> Measure:
        """The same run with another config, whose data and model are the same, or on other chips."""
        facts = copy.copy(self.facts)  # with what it has read
        facts.config = config
        return Measure(facts, chips or self.slice, self.say)

    @property
    def trained_methods(self) -> list[Method]:
        """The methods that are trained."""
        return [method for method in self.config.compared_methods if method.pruned_from is None]

    @property
    def first_method(self) -> Method:
        """The method that asks for most: the first that distils, or else the first that is trained."""
        return next(
            (method for method in self.trained_methods if method.distils), (*self.trained_methods, METHODS["sft"])[0]
        )

    @property
    def different_methods(self) -> list[Method]:
        """One method for each train step: those with the same terms and parts of a row have the same program."""
        by_program = {(m.terms, m.target == "none", m.teacher_sees_answer): m for m in reversed(self.trained_methods)}
        return list(reversed(by_program.values()))

    def _programs(self, method: Method, batch_size: int | None = None) -> Programs:
        size = batch_size or self.config.train.batch_size
        with jax.set_mesh(self.mesh):
            sides = self.facts.sides(method, size)
        return Programs(self.facts.decoder, self.config, self.mesh, sides, size, self.facts.tokenizer)

    @cached_property
    def resident(self) -> dict[str, float]:
        """Bytes on each device throughout training, by purpose."""
        programs = self.programs(self.first_method)
        state = programs.state
        return {
            "parameters": bytes_per_device(state.params),
            "teacher": bytes_per_device(programs.params),
            "optimiser": bytes_per_device((state.opt_state, state.balance, state.step)),
        }

    def _host(self, phase: str) -> dict[str, float]:
        """Bytes of the host's memory for each device, where it is the devices' own, beside the arrays of a phase: those
        of the process, and in training of a checkpoint that is written meanwhile, the copy of the state and what
        TensorStore has of it."""
        if self.slice.chip.kind != CPU:
            return {}
        state = self.resident["parameters"] + self.resident["optimiser"]
        written = 0 if phase in ("refine", "evaluate") else 2 * state
        return {"host": PROCESS_BYTES / len(self.slice.devices) + written}

    @property
    def static_bytes(self) -> float:
        """Bytes on each device throughout training, before anything is computed."""
        return sum(self.resident.values())

    def worth_compiling(self, kept: float) -> bool:
        """Whether so many bytes, which lie on a device before anything is computed, leave any room."""
        memory = self.slice.chip.memory
        return memory is None or kept < memory

    def least(self) -> list[Phase]:
        """The phases of the first method, not compiled: what they take at least."""
        method = self.first_method
        phases = [self.rollout(method, compiled=False)] if method.distils else []
        if self.facts.refines_itself:
            phases.append(self.refine(compiled=False))
        return [self.step(method, compiled=False), *phases, self.evaluate(compiled=False)]

    def step(self, method: Method, compiled: bool = True, batch_size: int | None = None) -> Phase:
        """The train step of a method."""
        programs, row = self.programs(method, batch_size), self.facts.row_tokens(method)
        size = programs.batch_size
        what = f"train {method.name}"
        compiled = compiled and self.worth_compiling(self.static_bytes)
        reading = self._read(f"{what}, batch {size}", programs, lambda: programs.step(method)) if compiled else None
        parts = dict(self.resident)
        reads_teacher = method.distils or method.anchors or self.config.train.lora.rank > 0
        total = self.static_bytes if reading is None else reading.total + (0 if reads_teacher else parts["teacher"])
        parts["activations"] = max(0.0, total - self.static_bytes)
        remat = self.config.model.remat
        tokens = size * tokens_of(row) / self._shards
        return self._phase(
            what,
            parts,
            total,
            reading,
            size * self.flops.train(row, method, remat),
            Traffic(programs, self.flops).train(tokens, 2 + remat, method.distils or method.anchors),
            size,
        )

    def rollout(self, method: Method, compiled: bool = True) -> Phase:
        """The rollouts of a step."""
        programs, row = self.programs(method), self.facts.row_tokens(method)
        size, new = programs.batch_size, self.config.train.rollout.max_new_tokens
        beside = self.resident["optimiser"] + (0 if self.config.train.lora.rank else self.resident["teacher"])
        slots = programs.sides.prompt.length + new
        kept = {**self.resident, "cache": float(programs.cache_bytes(size, slots))}
        compiled = compiled and self.worth_compiling(sum(kept.values()))
        reading = self._read(f"rollout, batch {size}", programs, programs.rollout, new) if compiled else None
        total = sum(kept.values()) if reading is None else reading.total + beside
        parts = kept | {"activations": max(0.0, total - sum(kept.values()))}
        return self._generation("rollout", programs, parts, total, reading, row.prompt, new, size)

    def refine(self, compiled: bool = True) -> Phase:
        """Decoding of rewritings and fusions, with the longest prompts."""
        new, row = self.config.refine_max_new_tokens, self.facts.row_tokens(METHODS["sft"])
        rows, _ = self.places(self.config.refine.batch_size, self.facts.num_train)
        prompt = 2 * row.answer + INSTRUCTION_TOKENS
        return self._decode("refine", rows, self.facts.refine_prompt(), prompt, new, {}, compiled)

    def evaluate(self, compiled: bool = True) -> Phase:
        """Decoding of a model's answers to the held-out questions, beside the base model."""
        settings, row = self.config.evaluate, self.facts.row_tokens(METHODS["sft"])
        rows, _ = self.places(settings.batch_size, self.facts.num_test)
        beside = {"parameters": self.resident["teacher"]}
        return self._decode(
            "evaluate", rows, self.facts.question_prompt(), row.prompt, settings.max_new_tokens, beside, compiled
        )

    def places(self, batch_size: int, count: int | None) -> tuple[int, int | None]:
        """Rows that are decoded at once, and how many times so many it takes for all; None if not known."""
        rows = rows_per_batch(batch_size, count or batch_size, self.mesh)
        return rows, count if count is None else -(-count // rows)

    def _decode(self, name: str, rows: int, slots: int, prompt: float, new: int, beside, compiled: bool) -> Phase:
        programs = self.programs(self.first_method)
        model = self.resident["teacher"]
        kept = beside | {"teacher": model, "cache": float(programs.cache_bytes(rows, slots + new))}
        compiled = compiled and self.worth_compiling(sum(kept.values()))
        what = f"{name}, {rows} rows"
        reading = self._read(what, programs, lambda: programs.decode(rows, slots, new), new) if compiled else None
        total = sum(kept.values()) if reading is None else reading.total + sum(beside.values())
        parts = kept | {"activations": max(0.0, total - sum(kept.values()))}
        return self._generation(name, programs, parts, total, reading, prompt, new, rows)

    def _generation(self, name, programs, parts, total, reading, prompt: float, new: int, rows: int) -> Phase:
        traffic = Traffic(programs, self.flops).generate(rows, prompt, new)
        return self._phase(name, parts, total, reading, rows * self.flops.generate(prompt, new), traffic, rows)

    def _phase(self, name, parts, total, reading, flops: float, traffic: float, rows: int) -> Phase:
        seconds, host = seconds_of(self.slice.chip, self.mesh.size, flops, traffic, reading), self._host(name)
        return Phase(name, parts | host, total + sum(host.values()), reading, flops, seconds, rows)

    def _read(self, what: str, programs: Programs, lower, num_steps: int = 1) -> Reading:
        self.say(f"compiling {what}")
        return compile_and_read(programs, lower, num_steps)

    @property
    def _shards(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]


def with_train(config: Config, **changes) -> Config:
    """A config with other settings of training."""
    return replace(config, train=replace(config.train, **changes))
