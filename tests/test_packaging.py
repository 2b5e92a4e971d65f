"""What pip brings: the losses with jax and numpy alone, one error that names the extra for the rest, whole packages."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from environments import build_packages, make_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "raft_jax").rglob("*.py")
    if path.name != "__main__.py"
)
NAMES_THE_EXTRA = "pip install 'raft-jax[train]'"


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with those of extras that it names itself."""
    found = list(map(Requirement, PROJECT["dependencies"]))
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            found += requirements(*requirement.extras) if requirement.name == PROJECT["name"] else [requirement]
    return [requirement for requirement in found if not requirement.marker or requirement.marker.evaluate()]


def brought_by(waiting: list[Requirement]) -> dict[str, metadata.Distribution]:
    """The installed distributions that requirements bring, with what these require in turn."""
    found: dict[str, metadata.Distribution] = {}
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name not in found:
            found[name] = metadata.distribution(name)
            required = map(Requirement, found[name].requires or ())
            waiting += [needed for needed in required if not needed.marker or needed.marker.evaluate({"extra": ""})]
    return found


def test_alone_it_brings_jax_and_numpy():
    assert {requirement.name for requirement in requirements()} == {"jax", "numpy"}


@pytest.mark.parametrize("extra", ["cuda", "tpu", "plan", "test", "eval"])
def test_other_extras_bring_what_training_needs(extra):
    names = {requirement.name for requirement in requirements(extra)}
    assert names >= {requirement.name for requirement in requirements("train")} > {"flax", "optax", "omegaconf"}


def test_whatever_is_imported_is_brought():
    """Of all import statements, those inside functions too. pyarrow is asked for by name where a file needs it, and the
    harness and what it brings are the extra eval's, the bucket's file system is gcs's."""
    found = set()
    for path in (ROOT / "raft_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    brought = brought_by(requirements("train"))
    distributions = metadata.packages_distributions()
    missing = {
        module
        for module in found - {"raft_jax"} - sys.stdlib_module_names
        if not {canonicalize_name(name) for name in distributions.get(module, ())} & brought.keys()
    }
    assert missing <= {"pyarrow", "lm_eval", "datasets", "nltk", "gcsfs", "aiohttp"}
    assert {"gcsfs", "aiohttp", "google-auth", "fsspec"} <= brought_by(requirements("gcs")).keys()
    assert {"lm-eval", "nltk"} <= {canonicalize_name(requirement.name) for requirement in requirements("eval")}


# With jax and numpy alone


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """`alone(program, *arguments)`: runs a program where only raft_jax is, and what it requires without an extra."""
    site = tmp_path_factory.mktemp("site")
    (site / "raft_jax").symlink_to(ROOT / "raft_jax")
    for distribution in brought_by(requirements()).values():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            (site / top).symlink_to(distribution.locate_file(top))

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
        # Neither the site-packages of this Python nor its environment variables.
        command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(site)!r})\n{program}"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=site)

    assert run("import flax").stderr.endswith("No module named 'flax'\n")
    return run


def test_the_losses_need_no_more(alone):
    done = alone("""
import jax.numpy as jnp
import raft_jax
from raft_jax.losses import linear_top_k_forward_kl, cross_entropy
print(float(cross_entropy(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), int))[0, 0]))
hidden, table = jnp.ones((1, 1, 3)), jnp.eye(3)
print(float(linear_top_k_forward_kl(hidden, table, hidden, table, k=2)[0, 0]))
""")
    uniform, same = map(float, done.stdout.split())
    assert uniform == pytest.approx(1.3862944, abs=1e-6)  # log 4
    assert same == pytest.approx(0, abs=1e-6)


def test_every_other_module_works_or_names_the_extra(alone):
    done = alone(
        """
import importlib, json
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        print(json.dumps([name, None, ""]))
    except Exception as error:
        print(json.dumps([name, type(error).__name__, str(error)]))
""",
        *MODULES,
    )
    found = {name: (kind, text) for name, kind, text in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == set(MODULES), done.stderr
    refused = {name for name, (kind, _) in found.items() if kind}
    for name in refused:
        kind, text = found[name]
        assert kind == "MissingExtra" and NAMES_THE_EXTRA in text and "\n" not in text, f"{name}: {kind}: {text}"
    assert refused >= {
        "raft_jax.models",
        "raft_jax.train.step",
        "raft_jax.checkpoint",
        "raft_jax.sampling",
        "raft_jax.report",
        "raft_jax.run",
        "raft_jax.generate",
    }
    assert not {name for name in refused if name.startswith(("raft_jax.losses", "raft_jax.data", "raft_jax.config"))}


@pytest.mark.parametrize(
    "call",
    [
        "raft_jax.config_file.load_config('config.yaml')",
        "raft_jax.settings_text.parse_yaml('a: 1', 'config.yaml')",
        "raft_jax.sources.resolve('hf://owner/name')",
        "raft_jax.data.examples.load_examples('folder')",
    ],
)
def test_functions_name_it_too(alone, call):
    done = alone(f"""
import importlib, pathlib
pathlib.Path("folder").mkdir(exist_ok=True)
for name in ("config.yaml", "folder/features.json", "folder/dataset_info.json"):
    pathlib.Path(name).write_text("{{}}")
import {call.partition("(")[0].rpartition(".")[0]}
{call}
""")
    assert NAMES_THE_EXTRA in done.stderr.splitlines()[-1]


COMMAND_LINE = "from raft_jax.cli import main\nsys.exit(main(sys.argv[1:]))"


def test_help_needs_no_extra(alone):
    done = alone(COMMAND_LINE, "--help")
    assert done.returncode == 0 and "refine" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "config.yaml"),
        ("check", "config.yaml"),
        ("report", "config.yaml"),
        ("generate", "Why?", "--model", "x"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_verb_is_one_line_that_names_the_extra(alone, arguments):
    done = alone(COMMAND_LINE, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("raft-jax: error: flax, ") and NAMES_THE_EXTRA in done.stderr


# The packages


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> tuple[Path, Path]:
    return build_packages(tmp_path_factory.mktemp("packages"))


def test_the_wheel_holds_the_package_and_no_more(packages):
    names = set(zipfile.ZipFile(packages[0]).namelist())
    ours = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "raft_jax").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if not re.match(r"raft_jax-[\d.]+\.dist-info/", name)} == ours
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_neither_tests_nor_benchmarks(packages):
    with tarfile.open(packages[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "raft_jax/losses/linear.py", "raft_jax/report/page.js"} <= names
    tops = {name.partition("/")[0] for name in names} - {""}
    assert tops == {
        "pyproject.toml",
        "setup.cfg",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "raft_jax",
        "raft_jax.egg-info",
    }


@pytest.mark.slow
def test_pip_installs_the_losses_alone_and_twine_accepts_the_packages(packages, tmp_path):
    run = make_environment(tmp_path / "venv", packages[0])
    listed = json.loads(run("-m", "pip", "list", "--disable-pip-version-check", "--format", "json"))
    installed = {canonicalize_name(line["name"]) for line in listed}
    assert installed - {"pip", "setuptools"} == {
        "raft-jax",
        "jax",
        "jaxlib",
        "ml-dtypes",
        "numpy",
        "opt-einsum",
        "scipy",
    }
    program = (
        "import jax.numpy as jnp; from raft_jax.losses import cross_entropy; "
        "print(cross_entropy(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), int))[0, 0])"
    )
    assert float(run("-c", program)) == pytest.approx(1.3862944, abs=1e-5)
    twine = make_environment(tmp_path / "twine", "twine")
    assert twine("-m", "twine", "check", "--strict", *packages).count("PASSED") == 2
