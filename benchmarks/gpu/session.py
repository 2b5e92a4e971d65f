"""What one GPU can tell in a quarter of an hour: parts in order of worth, each in a process of its own.

    python benchmarks/gpu/session.py --out FOLDER                        # everything that fits in 470 seconds
    python benchmarks/gpu/session.py --out FOLDER --parts decode,attention
    python benchmarks/gpu/session.py --out FOLDER --tiny                 # the same on a CPU, with sizes of no meaning

FOLDER/session.json has a section for each part, written after every measurement, and FOLDER/session.log what the
parts printed. A part that fails, or is cut off by its time limit, is recorded as such with the end of its output and
what it had measured, and the next one runs. Compiled programs are kept beside FOLDER, so that a second call is quick.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from dataclasses import dataclass
from pathlib import Path

import record as records
from pack import PACKED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKED_FOR = (3, 12)
TAIL_BYTES = 4000
TINY_LIMIT = 300  # seconds of a part that has nothing to measure, on a machine that may be busy
GRACE = 5  # seconds between asking a process to end and ending it


@dataclass(frozen=True)
class Part:
    """A function `module.function(record, tiny)` and the seconds that it may take."""

    name: str
    limit: float
    module: str
    function: str = "run"
    memory_fraction: float | None = None  # of the device, for JAX; None: JAX's own default
    torch: bool = False  # JAX then takes device memory as it needs it, and leaves the rest


# In order of worth. The limits sum to more than a call may take: what one part leaves over is for the later ones,
# and --seconds bounds the whole.
PARTS = (
    Part("environment", 45, "environment"),
    Part("references", 75, "references", "kernels_and_losses"),
    Part("train_step", 30, "references", "train_step"),
    Part("losses", 75, "loss_speed", "ours"),
    Part("losses_torch", 60, "loss_speed", "others", torch=True),
    Part("decode", 90, "decode_speed"),
    Part("attention", 45, "attention_speed"),
    Part("step_smollm2", 50, "step_speed", "smollm2"),
    Part("trl_smollm2", 40, "trl_speed", "smollm2", torch=True),
    Part("step_1b", 60, "step_speed", "llama_1b"),
    Part("trl_1b", 45, "trl_speed", "llama_1b", torch=True),
    Part("step_3b", 75, "step_speed", "llama_3b", memory_fraction=0.95),
    Part("trl_3b", 60, "trl_speed", "llama_3b", torch=True),
    Part("step_8b_lora", 75, "step_speed", "llama_8b_lora", memory_fraction=0.95),
    Part("quickstart", 240, "quickstart"),
)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "session.json"
    if options.part:
        part = next(part for part in options.parts if part.name == options.part)
        return run_part(part, options.tiny, records.Record(path, part.name, kept_folder(options.out)))
    kept = prepared(options.out)
    if options.one_process:
        sys.path[:0] = search_path(kept)
    began = time.monotonic()
    content = records.read(path)
    content |= {
        "tiny": options.tiny,
        "seconds_allowed": options.seconds,
        "source": source_hash(),
        "commit": commit(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    records.write(path, content)
    for part in options.parts:
        section = run_one(part, options, kept, options.seconds - (time.monotonic() - began))
        content = records.read(path)
        content["parts"][part.name] = content["parts"].get(part.name, {}) | section
        content["seconds"] = time.monotonic() - began
        records.write(path, content)
        print(
            f"{part.name:14} {section['status']:8} {section.get('seconds', 0):6.1f} s  {section.get('why', '')[:200]}",
            flush=True,
        )
    print(f"{path}: {content['seconds']:.0f} s")
    return 0


def run_one(part: Part, options: argparse.Namespace, kept: Path, left: float) -> dict:
    """A part's section as far as this process knows it; the part itself has written the rest."""
    limit = min(TINY_LIMIT if options.tiny else part.limit, left)
    if limit < 1:
        return {"status": "not run", "why": f"--seconds {options.seconds:g} are spent"}
    if not options.one_process:
        return supervise(part, limit, options, kept)
    began, path = time.monotonic(), options.out / "session.json"
    run_part(part, options.tiny, records.Record(path, part.name, kept))
    return {"seconds": time.monotonic() - began, "status": records.read(path)["parts"][part.name]["status"]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, required=True, help="folder of session.json and session.log")
    parser.add_argument("--parts", help=f"some of {','.join(names)}; in this order. Default: all")
    parser.add_argument("--seconds", type=float, default=470, help="of the whole call; default 470")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU gets through in seconds")
    parser.add_argument(
        "--extra",
        type=part_of,
        action="append",
        default=[],
        metavar="NAME:LIMIT:MODULE:FUNCTION",
        help="another part, from a module on PYTHONPATH; runs after the others",
    )
    parser.add_argument(
        "--one-process",
        action="store_true",
        help="all parts in this one: saves imports, but has no limits and survives no crash",
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the child: one part in this process
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g} must be above 0")
    wanted = names if options.parts is None else [name for name in options.parts.split(",") if name]
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--parts {','.join(unknown)} is not known; use some of {','.join(names)}")
    options.out = options.out.resolve()
    options.parts = [part for part in PARTS if part.name in wanted] + options.extra
    return options


def part_of(text: str) -> Part:
    name, limit, module, function = text.split(":")
    return Part(name, float(limit), module, function)


def kept_folder(out: Path) -> Path:
    """The folder beside `out` for what lasts from one call to the next: programs, and packages that were carried."""
    return out.with_name(f"{out.name}-kept")


def prepared(out: Path) -> Path:
    """That folder, with the packages that this Python has not got of its own."""
    kept = kept_folder(out)
    kept.mkdir(mode=0o700, exist_ok=True)  # compiled programs are trusted code
    site = kept / "site"
    site.mkdir(exist_ok=True)
    for wheel in sorted(PACKED.glob("*/wheels/*.whl")) if sys.version_info[:2] == PACKED_FOR else []:
        done = site / f".{wheel.name}"
        if not done.exists() and not installed(wheel.name.partition("-")[0]):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            done.touch()
    return kept


def installed(package: str) -> bool:
    try:
        return importlib.metadata.distribution(package) is not None
    except importlib.metadata.PackageNotFoundError:
        return False


def supervise(part: Part, limit: float, options: argparse.Namespace, kept: Path) -> dict:
    """Runs a part in a process of its own, ends it at its limit, and says how it went."""
    began = time.monotonic()
    command = [
        sys.executable,
        str(HERE / "session.py"),
        "--out",
        str(options.out),
        "--part",
        part.name,
        *(["--tiny"] if options.tiny else []),
    ]
    for extra in options.extra:
        command += ["--extra", f"{extra.name}:{extra.limit}:{extra.module}:{extra.function}"]
    log = options.out / "session.log"
    with log.open("ab") as output:
        output.write(f"--- {part.name}\n".encode())
        output.flush()
        start = output.tell()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            env=environment(part, options.tiny, kept),
        )
        try:
            code, cut = process.wait(limit), False
        except subprocess.TimeoutExpired:
            code, cut = end(process), True
        except BaseException:  # this process is ended: nothing may run on behind it
            end(process)
            raise
    with log.open("rb") as output:
        output.seek(max(start, log.stat().st_size - TAIL_BYTES))
        tail = output.read().decode(errors="replace")
    section = {"seconds": time.monotonic() - began, "limit": limit}
    found = records.read(options.out / "session.json")["parts"].get(part.name, {})
    if cut:
        return section | {"status": "cut off", "why": f"its limit of {limit:.0f} s", "output_tail": tail}
    if code or found.get("status") not in ("ok", "skipped"):
        lines = tail.strip().splitlines()
        return section | {
            "status": "failed",
            "why": lines[-1] if lines else f"exit status {code}",
            "exit": code,
            "output_tail": tail,
        }
    return section | {"status": found["status"]}


def end(process: subprocess.Popen) -> int:
    """Ends a part with all that it has started, which is its process group."""
    for sign, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
            return process.wait(patience)
        except ProcessLookupError:
            return process.wait()
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("unreachable: the last wait has no limit")


def search_path(kept: Path) -> list[str]:
    """Where the parts import from: the kit, the other benchmarks, the references of the tests, and what was carried."""
    return [str(folder) for folder in (HERE, HERE.parent, ROOT / "tests", ROOT, kept / "site")]


def environment(part: Part, tiny: bool, kept: Path) -> dict[str, str]:
    """The part's environment variables; what the caller has set stays."""
    own = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    if tiny:
        own["JAX_PLATFORMS"] = "cpu"
    if part.torch:
        own["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if part.memory_fraction is not None:
        own["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(part.memory_fraction)
    path = [*search_path(kept), *filter(None, [os.environ.get("PYTHONPATH")])]
    return own | dict(os.environ) | {"PYTHONPATH": os.pathsep.join(path)}


def run_part(part: Part, tiny: bool, record: records.Record) -> int:
    """The child's side: one part, from the first import to its status."""
    began = time.process_time()
    record.set(status="running", results={})
    try:
        record.set(device=device(tiny, record.kept))
        getattr(importlib.import_module(part.module), part.function)(record, tiny)
    except records.Skipped as skipped:
        record.set(status="skipped", why=str(skipped))
        return 0
    except Exception as error:
        traceback.print_exc()
        record.set(status="failed", why=f"{type(error).__name__}: {error}"[-500:])
        return 1
    record.set(status="ok", cpu_seconds=time.process_time() - began)
    return 0


def device(tiny: bool, kept: Path) -> str:
    """Sets JAX up for a measurement, and names what it runs on."""
    import jax

    if tiny:  # what takes time there is compiling
        jax.config.update("jax_disable_most_optimizations", True)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(kept / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return jax.devices()[0].device_kind


def source_hash() -> str:
    """Names the code that ran, also where there is no repository around it."""
    digest = hashlib.sha256()
    for folder in ("raft_jax", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        )
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
