"""The command line. Each verb imports its stage when it runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from raft_jax import __version__
from raft_jax.errors import InputError

STAGES = {
    "run": "all stages: refine, train, export, evaluate, report",
    "refine": "rewrite, filter and fuse the training answers",
    "train": "train every method of the config, refining first where one needs it",
    "export": "write every trained model as a Hugging Face folder",
    "evaluate": "measure the base model and every trained one",
    "report": "write report.html from what the run folder holds",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; bad input is one line on stderr and exit code 2."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        return args.function(args) or 0
    except InputError as error:
        if args.traceback:
            raise
        print(f"raft-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\nraft-jax: {error or 'stopped; the same command goes on from here'}", file=sys.stderr)
        return 130


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
    with_config.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the file's")
    for name, text in STAGES.items():
        verb = verbs.add_parser(name, parents=[with_config], help=text, description=text[0].upper() + text[1:] + ".")
        verb.set_defaults(function=_stage, stage=name)
    text = "look at config and data, start nothing, and show one training example"
    verbs.add_parser("check", parents=[with_config], help=text, description=text).set_defaults(function=_check)

    text = "ask a model a question; two models answer side by side"
    verb = verbs.add_parser("generate", parents=[shared], help=text, description=text)
    verb.add_argument("question")
    verb.add_argument("--model", action="append", required=True, metavar="SOURCE",
                      help="a folder, a .gguf file, package://MODULE/PATH or hf://OWNER/NAME; may be given twice")
    verb.add_argument("--max-new-tokens", type=int, default=256)
    verb.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    verb.add_argument("--seed", type=int, default=0)
    verb.set_defaults(function=_generate)
    return parser


def _stage(args) -> int:
    from raft_jax.config import load_config

    config = load_config(args.config, args.overrides)
    _start_jax()
    from rich.console import Console

    from raft_jax.report import print_summary
    from raft_jax.run import Run, open_run_dir

    with open_run_dir(config) as run_dir:
        run = Run(config, run_dir)
        if args.stage == "run":
            run.all()
            print_summary(run_dir, Console())
        else:
            made = getattr(run, args.stage)()
            if args.stage == "report":
                print(made)
    return 0


def _check(args) -> int:
    from rich.console import Console

    from raft_jax.config import load_config
    from raft_jax.run import check

    check(load_config(args.config, args.overrides), Console())
    return 0


def _generate(args) -> int:
    if len(args.model) > 2:
        raise InputError(f"--model was given {len(args.model)} times; give one or two")
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise InputError("--max-new-tokens must be 1 or more, and --temperature 0 or more")
    _start_jax()
    import jax
    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel

    from raft_jax.data.prompts import question_prompt
    from raft_jax.models import load_pretrained
    from raft_jax.sampling import Sampler

    panels = []
    for source in args.model:
        model = load_pretrained(source)
        prompt = model.tokenizer.chat_prompt(question_prompt(args.question))
        (completion,) = Sampler(model, batch_size=1).generate(
            model.params, [prompt], key=jax.random.key(args.seed), temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
        )
        answer = model.tokenizer.decode(completion.tokens).strip()
        panels.append((source, answer if completion.finished else answer + " …"))
    console = Console()
    if len(panels) == 1:
        console.print(panels[0][1], markup=False)
    else:
        width = max(30, console.width // 2 - 1)
        console.print(Columns([Panel(_plain(text), title=_plain(name), width=width) for name, text in panels]))
    return 0


def _plain(text: str):
    from rich.text import Text

    return Text(text)


def _start_jax() -> None:
    """Joins the other processes, where the environment says that there are any.

    On TPU slices and under Slurm JAX finds the others itself; elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say where they are.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import jax

    if "JAX_NUM_PROCESSES" in os.environ:
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]), process_id=int(os.environ["JAX_PROCESS_ID"])
        )
    elif "tpu" in os.environ.get("JAX_PLATFORMS", "") or "SLURM_NTASKS" in os.environ:
        jax.distributed.initialize()


if __name__ == "__main__":
    sys.exit(main())
