"""The command `raft-jax plan`."""

from __future__ import annotations

import json
import sys

from raft_jax.config import Config
from raft_jax.errors import InputError
from raft_jax.plan.environment import set_environment
from raft_jax.terminal import visible


def run(
    config: Config,
    topology: str,
    *,
    rows: int | None = None,
    price: float | None = None,
    memory: float | None = None,
    quick: bool = False,
    as_json: bool = False,
) -> int:
    """Prints the plan of a run, and returns 0; progress goes to stderr.

    Args:
      config: of the run.
      topology: a slice that libtpu knows, or "local".
      rows: number of training rows, where the data is not there.
      price: USD of a chip-hour.
      memory: gigabytes of each device, in place of what is known of it.
      quick: nothing is compiled besides the config's own programs.
      as_json: prints JSON, and nothing else, to stdout.

    Raises:
      InputError: see `make_plan`; or an unknown topology, or libtpu is missing.
    """
    for name, value in (("--rows", rows), ("--price", price), ("--memory", memory)):
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name} {value:g} must be above 0")
    set_environment(topology)
    from raft_jax.plan.chips import find_slice  # jax, once the environment is set
    from raft_jax.plan.plan import look_further, make_plan
    from raft_jax.plan.text import tables_of, verdict_of

    chips = find_slice(topology, memory and memory * 1e9)
    plan = make_plan(config, chips, _report, rows=rows, price=price)
    if not as_json:  # before what takes long again
        print(*map(visible, tables_of(plan)), sep="\n", flush=True)
    look_further(plan, quick)
    if as_json:
        print(json.dumps(plan.as_json(), indent=1, allow_nan=False))
    else:
        print(*map(visible, verdict_of(plan)), sep="\n", flush=True)
    return 0


def _report(text: str) -> None:
    print(visible(f"plan: {text}"), file=sys.stderr, flush=True)
