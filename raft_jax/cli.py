"""The command line. Each verb imports its stage only when it runs, so that --help is fast."""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from raft_jax import __version__, bucket, gpu_environment, interrupt
from raft_jax.config import DTYPES
from raft_jax.config_file import load_config
from raft_jax.errors import InputError, require_train
from raft_jax.terminal import one_line, visible

STAGES = {
    "run": "all stages: refine, train, export, evaluate, report",
    "refine": "rewrite, filter and fuse the training answers",
    "train": "train and export every method of the config, refining first where one needs it",
    "export": "write every trained model as a Hugging Face folder, training first what is not trained",
    "evaluate": "measure the base model and every trained one",
}
# The tables that are printed at the end of a stage; `run` prints all.
TABLES = {
    "refine": ("outputs",),
    "train": ("training", "outputs"),
    "export": ("outputs",),
    "evaluate": ("scores", "more", "forgetting", "outputs"),
}
LOG_WIDTH = 120
DEAD_AFTER = 45  # seconds without a sign of life of a process, after which JAX ends the others
LAUNCHERS = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri")  # set by srun and by mpirun, which JAX recognises
LONGEST_LINE = 4000  # characters of an error message


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; for bad input, prints one line on stderr and returns 2."""
    parser = make_parser()
    args, rest = parser.parse_known_args(arguments)
    if stray := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    args.words = [*args.words, *rest]  # argparse ends a list of positional arguments at the first option
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for a log that is not UTF-8
    try:
        require_train("flax", "jinja2", "omegaconf", "optax", "orbax", "rich", "tokenizers", "transformers")
        return args.function(args) or 0
    except KeyboardInterrupt as error:
        print(f"\nraft-jax: {str(error) or 'stopped; the same command goes on from here'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if (text := _complaint(error)) is None:
            _leave_if_another_process_died(error)
            raise
        if args.traceback:
            import traceback

            traceback.print_exc()
        print(f"raft-jax: error: {one_line(text, LONGEST_LINE)}", file=sys.stderr)
        return 2


def _complaint(error: Exception) -> str | None:
    """The message for an error that the user can fix; None for a bug."""
    if isinstance(error, InputError):
        return str(error)
    # Orbax reports a full disk as a ValueError with this text.
    if os.strerror(errno.ENOSPC) in str(error):
        return f"{os.strerror(errno.ENOSPC)}; free some, and the same command goes on from here"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror} ({errno.errorcode.get(error.errno, error.errno)})"
    return None


def _leave_if_another_process_died(error: Exception) -> None:
    """Ends this process with 3 where its devices failed and there are other processes.

    An ordinary end would wait for the others for minutes, and then abort in JAX's runtime.
    """
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError) or jax.process_count() == 1:
        return
    import traceback

    traceback.print_exc()
    message = "another process has ended or cannot be reached, or the devices have failed, see above"
    print(f"raft-jax: error: {message}; started on all machines, the same command goes on from here", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(3)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raft-jax",
        description="RAFT in JAX: a language model learns a domain without forgetting the rest.",
    )
    parser.add_argument("--version", action="version", version=f"raft-jax {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--traceback", action="store_true", help="show where an error comes from")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    with_config = argparse.ArgumentParser(add_help=False, parents=[shared])
    with_config.add_argument("config", help="a YAML file, for example configs/quickstart.yaml")
    with_config.add_argument(
        "words", nargs="*", default=[], metavar="key.path=value", help="settings that replace the file's"
    )
    for name, text in STAGES.items():
        verb = verbs.add_parser(name, parents=[with_config], help=text, description=text[0].upper() + text[1:] + ".")
        verb.set_defaults(function=_stage, stage=name, preview=None)
        if name == "refine":
            text = "refine only the first N rows, and show each stage and what all rows would take"
            verb.add_argument("--preview", type=int, metavar="N", help=text)
    for name, text in (
        ("compare", "train every method with each of compare.learning_rates and compare.seeds, and compare them"),
        ("sweep", "the same for each value of another setting"),
    ):
        verb = verbs.add_parser(name, parents=[with_config], help=text, description=text[0].upper() + text[1:] + ".")
        text = "start nothing: say how many models are left, and what they take by steps measured here"
        verb.add_argument("--dry-run", action="store_true", help=text)
        if name == "sweep":
            text = "the setting and its values, such as train.temperature=1,1.5,2"
            verb.add_argument("--over", metavar="KEY=VALUE,VALUE", required=True, help=text)
        verb.set_defaults(function=_compare, over=None)
    for name, text, function in (
        ("report", "write report.html from what the run folder holds, be it finished or not", _report),
        ("check", "look at config, data and model, start nothing, and show one training example", _check),
    ):
        verb = verbs.add_parser(name, parents=[with_config], help=text, description=text[0].upper() + text[1:] + ".")
        verb.set_defaults(function=function)

    _add_plan(verbs, with_config)

    text = "show the prompts of rewriting, fusion, judges and teacher, or copy them to change them"
    verb = verbs.add_parser(
        "prompts", parents=[shared], help=text, description=text[0].upper() + text[1:] + " (refine.prompts=DIR)."
    )
    verb.add_argument("--copy", metavar="DIR", help="write the files into this folder; nothing there is replaced")
    verb.set_defaults(function=_prompts, words=[])

    _add_generate(verbs, shared)
    return parser


def _add_plan(verbs, with_config) -> None:
    """Adds the verb that says what a run takes on given chips."""
    text = "compile a run's programs for given chips, and say whether they fit, what bounds them, hours and cost"
    verb = verbs.add_parser("plan", parents=[with_config], help=text, description=text[0].upper() + text[1:] + ".")
    text = "a TPU slice such as v5e:4x4, or GPUs such as h100x8, which need not be at hand; default: those that are"
    verb.add_argument("--topology", metavar="NAME", default="local", help=text)
    verb.add_argument("--price", type=float, metavar="USD", help="of a chip-hour; adds the cost of the run")
    text = "number of training rows, where the data is not there"
    verb.add_argument("--rows", type=int, metavar="N", help=text)
    verb.add_argument("--memory", type=float, metavar="GB", help="of each device, in place of what is known of it")
    text = "compile the config's own programs only: no largest batch, and what might help is not compiled"
    verb.add_argument("--quick", action="store_true", help=text)
    verb.add_argument("--json", action="store_true", help="print JSON, and nothing else, to standard output")
    verb.set_defaults(function=_plan)


def _add_generate(verbs, shared) -> None:
    """Adds the verb that asks models a question."""
    text = "ask a question; base and tuned model answer side by side"
    verb = verbs.add_parser(
        "generate",
        parents=[shared],
        help=text,
        description=text[0].upper() + text[1:] + ".",
        usage="raft-jax generate [options] CONFIG QUESTION [key.path=value ...]\n"
        "       raft-jax generate [options] QUESTION --model SOURCE [--model SOURCE ...]\n"
        "       raft-jax generate [options] CONFIG --questions FILE",
    )
    verb.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="CONFIG QUESTION",
        help="of a run: its base model and "
        "every model that it has exported are asked; with --model, the question alone",
    )
    verb.add_argument("--questions", metavar="FILE", help="in place of QUESTION: one a line; - is standard input")
    verb.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the config's, or float32)")
    verb.add_argument(
        "--model",
        action="append",
        metavar="SOURCE",
        help="a folder, a .gguf file, package://MODULE/PATH or hf://OWNER/NAME[@REVISION]; may be given again",
    )
    verb.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    verb.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (the default) is greedy")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling, at temperatures above 0")
    verb.set_defaults(function=_generate)


def _stage(args) -> int:
    config = load_config(args.config, args.words)
    if args.preview is not None and args.preview < 1:
        raise InputError(f"--preview {args.preview}: it takes a number of rows, 1 or more")
    _start_jax()
    from raft_jax.methods import any_refines
    from raft_jax.preflight import require_sources
    from raft_jax.refine.roles import require_roles
    from raft_jax.report import print_summary
    from raft_jax.resume import open_run_folder
    from raft_jax.run import Run
    from raft_jax.run_folder import RunFolder

    require_sources(config)
    with ExitStack() as stack:
        stack.enter_context(interrupt.handled())
        stack.enter_context(bucket.kept(config.run_dir))
        refines = args.stage != "evaluate" and any_refines(config.methods)
        if refines and not RunFolder(config.run_dir).refined_jsonl.exists():
            list(require_roles(config))  # before the model is loaded
        folder = stack.enter_context(open_run_folder(config))
        run = Run(config, folder)
        stages = {
            "run": run.all,
            "refine": run.refine if args.preview is None else partial(run.preview, args.preview),
            "train": run.train,
            "export": run.train,
            "evaluate": run.evaluate,
        }
        stages[args.stage]()
        interrupt.check()
        if args.preview is not None:
            return 0
        run.report()
        print_summary(folder.path, _console_for_tables(), TABLES.get(args.stage))
        print(f"{folder}: {folder.num_bytes() / 1e9:.2f} GB on the disk")
    return 0


def _compare(args) -> int:
    from raft_jax.grid import make_grid

    grid = make_grid(args.config, args.words, args.over)
    _start_jax()
    from raft_jax.comparison import compare, dry_run
    from raft_jax.preflight import require_sources
    from raft_jax.report import print_comparison

    require_sources(grid.config)
    with interrupt.handled(), bucket.kept(grid.config.run_dir, writes=not args.dry_run):
        if args.dry_run:
            for line in dry_run(grid):
                print(visible(line), flush=True)
            return 0
        compare(grid)
    print_comparison(bucket.local_path(grid.config.run_dir), _console_for_tables())
    return 0


def _report(args) -> int:
    """Reads the run folder only and takes no lock, so that it also works while a run is in progress."""
    from raft_jax.report import write_reports
    from raft_jax.run_folder import shown

    run_dir = load_config(args.config, args.words).run_dir
    with bucket.kept(run_dir, several=False):
        for path in write_reports(bucket.local_path(run_dir)):
            print(visible(shown(path)))
    return 0


def _prompts(args) -> int:
    from raft_jax.data.prompts import copy_prompts, load_prompts

    if args.words:
        raise InputError(f"what is {args.words[0]!r}? the folder goes after --copy")
    if args.copy is not None:
        for path in copy_prompts(args.copy):
            print(visible(str(path)))
        print(visible(f"change them, and set refine.prompts={args.copy}"))
        return 0
    for name, text in load_prompts().texts.items():
        print(f"── {name}.txt\n{text}")
    return 0


def _check(args) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is computed is little; devices are left to runs
    from raft_jax.preflight import check

    # Names and texts from the user's files must not be read as rich's markup, nor "a:key:b" as an emoji.
    console = _console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    config = load_config(args.config, args.words)
    with bucket.kept(config.run_dir, several=False):
        check(config, console)
    return 0


def _plan(args) -> int:
    from raft_jax.plan.command import run

    config = load_config(args.config, args.words)
    if args.topology == "local":
        gpu_environment.set_gpu_environment()
    options = {name: getattr(args, name) for name in ("rows", "price", "memory", "quick")}
    return run(config, args.topology, as_json=args.json, **options)


def _console_for_tables():
    # A log has no width; rich would assume 80 columns and wrap the table's lines.
    return _console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_WIDTH)


def _console(**settings):
    """A console that prints control characters visibly, so that they have no effect on the terminal."""
    from rich.console import Console
    from rich.text import Text

    class VisibleConsole(Console):
        def print(self, *objects, **options):
            shown = []
            for item in objects:
                if isinstance(item, Text):
                    item = item.copy()
                    item.plain = visible(item.plain)
                shown.append(visible(item) if isinstance(item, str) else item)
            super().print(*shown, **options)

    return VisibleConsole(**settings)


def _generate(args) -> int:
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf:
        raise InputError("--max-new-tokens must be 1 or more, and --temperature 0 or more")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed} is outside 0 to 2**32 - 1")
    asked = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    words, config = list(args.words), None
    if not args.model:
        if not words or (len(words) == 1 and args.questions is None):
            raise InputError("which model? give a config before the question, or --model SOURCE")
        path, *words = words
        overrides = [word for word in words if _is_setting(word)]
        words = [word for word in words if word not in overrides]
        config = load_config(path, overrides)
        asked |= {name: getattr(config.model, name) for name in ("dtype", "attention", "thinking")}
    if args.dtype:
        asked["dtype"] = args.dtype
    questions = _questions(words, args.questions)
    _start_jax()
    from raft_jax.generate import generate, models_of

    if not config:
        generate([(source, source) for source in args.model], questions, _console(), **asked)
        return 0
    from raft_jax.run_folder import RunFolder

    with bucket.kept(config.run_dir, writes=False):
        models = models_of(config)
        if len(models) == 1:
            print(f"{config.run_dir}: no tuned model there; this is the base model", file=sys.stderr)
        generate(models, questions, _console(), **asked, date=RunFolder(config.run_dir).date_begun())
    return 0


def _is_setting(word: str) -> bool:
    """Whether a word is a setting such as `run_dir=x`, not a question."""
    from dataclasses import fields

    from raft_jax.config import Config

    name = re.match(r"(\w+)[\w.]*=", word)
    return name is not None and (name[1] in {field.name for field in fields(Config)} or "." in name[0])


def _questions(words: Sequence[str], source: str | None) -> list[str]:
    """The question of the command line, or one question per line of a file or of standard input."""
    if source is None:
        if not words:
            raise InputError("what is the question? give it in quotes, or --questions FILE (- is standard input)")
        if len(words) > 1:
            raise InputError(f"what is {words[1]!r}? a question of several words goes in quotes")
        return list(words)
    if words:
        raise InputError(f"with --questions there is no question beside it; what is {words[0]!r}?")
    if source == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"standard input: not UTF-8 ({error})") from error
    else:
        from raft_jax.files import read_text

        text = read_text(Path(source))
    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not questions:
        raise InputError(f"{'standard input' if source == '-' else source}: no questions in it; write one a line")
    return questions


def _start_jax() -> None:
    """Initialises `jax.distributed` if the environment says that there are several processes.

    On TPU slices (with JAX_PLATFORMS=tpu), under Slurm's srun and Open MPI's mpirun, JAX finds the other processes
    itself; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID have to be set.

    Raises:
      InputError: only some of the three are set, or one that should be a number is not.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    gpu_environment.set_gpu_environment()
    import jax

    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = map(os.environ.get, names)
    finds_others = "tpu" in os.environ.get("JAX_PLATFORMS", "") or any(name in os.environ for name in LAUNCHERS)
    if any(numbers) or (address and not finds_others):
        if not address or not all(number and number.isdecimal() for number in numbers):
            settings = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
            raise InputError(f"of several processes each needs an address, their number and its own: got {settings}")
        num_processes, process_id = map(int, numbers)
        jax.distributed.initialize(address, num_processes, process_id, heartbeat_timeout_seconds=DEAD_AFTER)
    elif finds_others:
        jax.distributed.initialize(heartbeat_timeout_seconds=DEAD_AFTER)


if __name__ == "__main__":
    sys.exit(main())
