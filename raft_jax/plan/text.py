"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raft_jax.plan.alternatives import Tried
from raft_jax.plan.facts import name_of
from raft_jax.plan.phases import KINDS, Phase
from raft_jax.plan.plan import HOUR, Plan, num_parameters

GIGA = 1e9
PARTS = ("parameters", "teacher", "optimiser", "cache", "host", "activations")


def tables_of(plan: Plan) -> Iterator[str]:
    """Lines on what is planned, and tables of the phases' memory and time."""
    measure = plan.measure
    chips, memory = measure.slice, measure.slice.chip.memory
    mesh = " × ".join(f"{axis} {size}" for axis, size in measure.mesh.shape.items())
    room = "of unknown memory" if memory is None else f"of {memory / GIGA:.3g} GB"
    count = f"{measure.num_chips:g} {'chips' if measure.num_chips != 1 else 'chip'}"
    yield (
        f"{name_of(measure.config)}, {num_parameters(measure) / GIGA:.3g} billion parameters, on {chips.topology} "
        f"({count}, {chips.chip.kind}, {room} a device); mesh {mesh}; batch {measure.config.train.batch_size}"
    )
    yield from measure.facts.notes
    yield f"lengths in slots: {_lengths(plan)}"
    yield ""
    parts = [name for name in PARTS if name != "host" or any(name in phase.parts for phase in plan.phases)]
    host = "; host: the process, and a checkpoint that is written meanwhile" if "host" in parts else ""
    yield (
        "GB on each device, by purpose (teacher: the base model; activations: gradients and temporary arrays, too"
        f"{host})"
    )
    yield from _table(("", *parts, "total", "compiler's total", "fits"), map(_memory(parts, memory), plan.phases))
    yield ""
    clock = chips.chip.clock
    yield (
        "each time that it runs: operations of all devices, GB that a device sends, seconds at least, and those of the "
        "compiler's own estimate"
    )
    yield from _table(
        ("", "FLOPs", "GB sent", *KINDS, "compiler's", "slowest", "collectives"), map(_time(clock), plan.phases)
    )
    yield ""


def _lengths(plan: Plan) -> str:
    sides = plan.measure.programs(plan.measure.first_method).sides
    train = plan.measure.config.train
    named = {"prompt": sides.prompt, "answer": sides.answer, "teacher's prompt": sides.teacher_prompt}
    lengths = [f"{name} {side.length}" for name, side in named.items() if side.length]
    if plan.measure.first_method.distils:
        lengths.append(f"rollout {train.rollout.max_new_tokens}")
    return ", ".join(lengths)


def _memory(names: Sequence[str], memory: float | None):
    def row(phase: Phase) -> Sequence[str]:
        parts = [_giga(phase.parts.get(name)) for name in names]
        compiled = "not compiled" if phase.reading is None else _giga(phase.reading.total)
        if phase.reading is None:
            parts[-1] = "–"
        more = "at least " if phase.reading is None else ""
        fits = {True: "yes", False: "no", None: "not known"}[phase.fits(memory)]
        return phase.name, *parts, more + _giga(phase.total), compiled, fits

    return row


def _time(clock: float | None):
    def row(phase: Phase) -> Sequence[str]:
        known = phase.reading is not None and not phase.reading.refused
        sent = phase.reading.collectives if known and phase.reading is not None else None
        kinds = "–" if not sent else ", ".join(f"{kind} {_giga(size)}" for kind, size in sent.items())
        total = _giga(None if sent is None else sum(sent.values()))
        seconds = [*phase.seconds.values(), phase.estimated(clock)]
        return phase.name, f"{phase.flops:.2e}", total, *map(_seconds, seconds), phase.slowest, kinds

    return row


def verdict_of(plan: Plan) -> Iterator[str]:
    """Lines on whether it fits, the largest batch, the whole run, and what would help."""
    memory = plan.measure.slice.chip.memory
    if plan.fits is False:
        worst = max(plan.phases, key=lambda phase: phase.total)
        least = "at least " if worst.reading is None else ""
        yield f"does not fit: {worst.name} needs {least}{_giga(worst.total)} GB of {_giga(memory)} GB on each device"
    elif plan.fits:
        most = max(phase.total for phase in plan.phases)
        yield f"fits: at most {_giga(most)} GB of {_giga(memory)} GB on each device"
    else:
        yield "whether it fits is not known: the memory of these devices is not"
    if plan.largest is not None:
        rows = "not known" if plan.largest.rows is None else str(plan.largest.rows)
        yield f"largest batch: {rows} ({plan.largest.how})"
    yield from _run(plan)
    if plan.tried:
        yield "what would help, tried by compiling the programs of a training step where not said otherwise:"
        yield from (f"  {tried_line(tried)}" for tried in plan.tried)


def _run(plan: Plan) -> Iterator[str]:
    """Lines on the time of the whole run."""
    if plan.hours is None:
        if plan.fits is not False:
            missing = "; --rows N says how many rows are trained on" if plan.measure.facts.num_train is None else ""
            yield f"the run: its hours are not known{missing}"
        return
    programs = ", ".join(f"{phase.name} × {plan.runs[phase.name]:,.0f}" for phase in plan.phases)
    yield f"the run ({programs}): at least {_spent(plan, plan.hours)}"
    if plan.estimated_hours is not None:
        yield f"  by the compiler's own estimate, and if nothing overlaps: {_spent(plan, plan.estimated_hours)}"
    yield "  without loading, compiling, likelihoods and checkpoints"


def _spent(plan: Plan, hours: float) -> str:
    cost = plan.cost(hours)
    return f"{_span(hours)}, {plan.chip_hours(hours):.2g} chip-hours" + ("" if cost is None else f", {cost:,.2f} USD")


def _span(hours: float) -> str:
    """Hours, or seconds of what is short.

    Example:
      >>> _span(2.345), _span(0.01)
      ('2.3 hours', '36 s')
    """
    return f"{hours:.2g} hours" if hours >= 0.2 else f"{hours * HOUR:.3g} s"


def tried_line(tried: Tried) -> str:
    """One line on a change that was tried."""
    if tried.total is None:
        return f"{tried.change}: cannot be ({tried.note})"
    fits = {True: "fits", False: "does not fit", None: "may fit"}[tried.fits]
    line = f"{tried.change}: {fits}, {_giga(tried.total)} GB"
    for before, after, what in (
        (tried.before, tried.seconds, "a step at least"),
        (tried.estimated_before, tried.estimated, "by the compiler's estimate"),
    ):
        if after is not None:
            line += f", {_seconds(after)} s {what}" + ("" if before is None else f" (before: {_seconds(before)} s)")
    return f"{line} ({tried.note})" if tried.note else line


def _giga(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / GIGA:.2f}" if value >= 5e6 or not value else f"{value / GIGA:.1e}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _table(head: Sequence[str], rows) -> Iterator[str]:
    """Lines with columns of one width, of which the first and the last begin at the left."""
    cells = [head, *rows]
    widths = [max(len(row[place]) for row in cells) for place in range(len(head))]
    for row in cells:
        parts = [row[0].ljust(widths[0])]
        parts += [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        yield "  ".join([*parts, row[-1]]).rstrip()
