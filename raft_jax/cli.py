"""The command line. Each verb imports its stage when it runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from raft_jax import __version__, interrupt
from raft_jax.errors import InputError

STAGES = {
    "run": "all stages: refine, train, export, evaluate, report",
    "refine": "rewrite, filter and fuse the training answers",
    "train": "train and export every method of the config, refining first where one needs it",
    "export": "write every trained model as a Hugging Face folder, training first what is not trained",
    "evaluate": "measure the base model and every trained one",
}
# What is shown at the end of a stage; of a whole run, everything.
TABLES = {
    "refine": ("outputs",), "train": ("training", "outputs"), "export": ("outputs",), "evaluate": ("scores", "outputs"),
}
LOG_WIDTH = 120


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; bad input is one line on stderr and exit code 2."""
    parser = make_parser()
    args, rest = parser.parse_known_args(arguments)
    if stray := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    args.words = [*args.words, *rest]  # argparse ends the list at the first option
    try:
        return args.function(args) or 0
    except InputError as error:
        if args.traceback:
            import traceback

            traceback.print_exc()
        print(f"raft-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\nraft-jax: {str(error) or 'stopped; the same command goes on from here'}", file=sys.stderr)
        return 130
    except Exception as error:
        # Orbax tells of a full disk in a ValueError with this text.
        if args.traceback or os.strerror(errno.ENOSPC) not in str(error):
            raise
        print(f"raft-jax: error: {os.strerror(errno.ENOSPC)}; free some, and the same command goes on from here",
              file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raft-jax", description="RAFT in JAX: a language model learns a domain without forgetting the rest.",
    )
    parser.add_argument("--version", action="version", version=f"raft-jax {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--traceback", action="store_true", help="show where an error comes from")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    with_config = argparse.ArgumentParser(add_help=False, parents=[shared])
    with_config.add_argument("config", help="a YAML file, for example configs/quickstart.yaml")
    with_config.add_argument("words", nargs="*", default=[], metavar="key.path=value",
                             help="settings that replace the file's")
    for name, text in STAGES.items():
        verb = verbs.add_parser(name, parents=[with_config], help=text, description=text[0].upper() + text[1:] + ".")
        verb.set_defaults(function=_stage, stage=name)
    for name, text, function in (
        ("report", "write report.html from what the run folder holds, be it finished or not", _report),
        ("check", "look at config, data and model, start nothing, and show one training example", _check),
    ):
        verb = verbs.add_parser(name, parents=[with_config], help=text, description=text[0].upper() + text[1:] + ".")
        verb.set_defaults(function=function)

    text = "ask a question; base and tuned model answer side by side"
    verb = verbs.add_parser(
        "generate", parents=[shared], help=text, description=text[0].upper() + text[1:] + ".",
        usage="raft-jax generate [options] CONFIG QUESTION [key.path=value ...]\n"
              "       raft-jax generate [options] QUESTION --model SOURCE [--model SOURCE ...]",
    )
    verb.add_argument("words", nargs="+", metavar="CONFIG QUESTION", help="of a run: its base model and every model "
                      "that it has exported are asked; with --model, the question alone")
    verb.add_argument("--model", action="append", metavar="SOURCE",
                      help="a folder, a .gguf file, package://MODULE/PATH or hf://OWNER/NAME; may be given again")
    verb.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    verb.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (the default) is greedy")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling, at temperatures above 0")
    verb.set_defaults(function=_generate)
    return parser


def _stage(args) -> int:
    from raft_jax.config import load_config

    config = load_config(args.config, args.words)
    _start_jax()
    from rich.console import Console

    from raft_jax.preflight import require_sources
    from raft_jax.report import print_summary
    from raft_jax.run import Run
    from raft_jax.run_dir import folder_bytes, open_run_dir

    require_sources(config)
    with interrupt.handled(), open_run_dir(config) as run_dir:
        run = Run(config, run_dir)
        getattr(run, "all" if args.stage == "run" else args.stage)()
        interrupt.check()
        run.report()
        # A log has no width; rich would take it for 80 columns and break the table's lines.
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_WIDTH
        print_summary(run_dir, Console(width=width), TABLES.get(args.stage))
        print(f"{run_dir}: {folder_bytes(run_dir) / 1e9:.2f} GB on the disk")
    return 0


def _report(args) -> int:
    """Reads the folder and nothing else, so that a run in progress may be looked at."""
    from raft_jax.config import load_config
    from raft_jax.report import write_report

    print(write_report(load_config(args.config, args.words).run_dir))
    return 0


def _check(args) -> int:
    from rich.console import Console

    from raft_jax.config import load_config
    from raft_jax.preflight import check

    # Names and texts of the user's are no markup, and "a:key:b" in one is no emoji.
    check(load_config(args.config, args.words), Console(markup=False, emoji=False, highlight=False, soft_wrap=True))
    return 0


def _generate(args) -> int:
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf:
        raise InputError("--max-new-tokens must be 1 or more, and --temperature 0 or more")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed} is outside 0 to 2**32 - 1")
    if args.model and len(args.words) > 1:
        raise InputError(f"with --model there is the question alone, in quotes; what is {args.words[1]!r}?")
    if not args.model and len(args.words) < 2:
        raise InputError("which model? give a config before the question, or --model SOURCE")
    asked = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    if args.model:
        question, config = args.words[0], None
    else:
        from raft_jax.config import load_config

        path, question, *overrides = args.words
        if stray := [word for word in overrides if "=" not in word]:
            raise InputError(f"what is {stray[0]!r}? a question of several words goes in quotes")
        config = load_config(path, overrides)
        asked |= {name: getattr(config.model, name) for name in ("dtype", "attention", "thinking")}
    _start_jax()
    from rich.console import Console

    from raft_jax.generate import generate, models_of

    if config:
        from raft_jax.run_dir import date_begun

        models = models_of(config)
        if len(models) == 1:
            print(f"{config.run_dir}: no tuned model there; this is the base model", file=sys.stderr)
        asked["date"] = date_begun(Path(config.run_dir))
    else:
        models = [(source, source) for source in args.model]
    generate(models, question, Console(), **asked)
    return 0


def _start_jax() -> None:
    """Joins the other processes, where the environment says that there are any.

    On TPU slices (with JAX_PLATFORMS=tpu) and under Slurm's srun JAX finds the others itself; elsewhere
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say where they are.

    Raises:
      InputError: only some of the three are set, or a number is none.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = map(os.environ.get, names)
    finds_others = "tpu" in os.environ.get("JAX_PLATFORMS", "") or "SLURM_STEP_NODELIST" in os.environ
    if any(numbers) or (address and not finds_others):
        if not address or not all(number and number.isdecimal() for number in numbers):
            given = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
            raise InputError(f"of several processes each needs an address, their number and its own: got {given}")
        num_processes, process_id = map(int, numbers)
        jax.distributed.initialize(address, num_processes, process_id)
    elif finds_others:
        jax.distributed.initialize()


if __name__ == "__main__":
    sys.exit(main())
