"""Who may import whom, read from the import statements, and what starting up really imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import raft_jax

ROOT = Path(raft_jax.__file__).parent
OURS = {
    ".".join(("raft_jax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
LOW = (
    "raft_jax.errors",
    "raft_jax.files",
    "raft_jax.interrupt",
    "raft_jax.methods",
    "raft_jax.sources",
    "raft_jax.terminal",
)  # stand below everything
# A module may import from raft_jax what its own row, or that of the package it is in, allows.
ALLOWED = {
    "raft_jax.errors": (),
    "raft_jax.files": ("raft_jax.errors",),
    "raft_jax.interrupt": (),
    "raft_jax.terminal": (),
    "raft_jax.sources": ("raft_jax.errors",),
    "raft_jax.config": ("raft_jax.endpoint_config",),
    "raft_jax.endpoint_config": (),
    "raft_jax.config_file": ("raft_jax.config", "raft_jax.settings_text"),
    "raft_jax.settings_text": (),
    "raft_jax.stages": (),
    "raft_jax.line_writer": (),
    "raft_jax.metrics": ("raft_jax.line_writer", "raft_jax.sharding"),
    "raft_jax.bucket": ("raft_jax.progress", "raft_jax.sharding"),
    "raft_jax.run_folder": (
        "raft_jax.bucket",
        "raft_jax.machine",
        "raft_jax.metrics",
        "raft_jax.outcome",
        "raft_jax.scores",
        "raft_jax.sharding",
        "raft_jax.stages",
    ),
    "raft_jax.scores": (),
    "raft_jax.outcome": ("raft_jax.data.refined",),
    "raft_jax.progress": (),
    "raft_jax.sharding": ("raft_jax.errors",),
    "raft_jax.losses": ("raft_jax.losses",),
    "raft_jax.tokens": (),
    "raft_jax.unpadding": ("raft_jax.sharding",),
    "raft_jax.host_memory": (),
    "raft_jax.models": (
        "raft_jax.host_memory",
        "raft_jax.models",
        "raft_jax.tokens",
        "raft_jax.unpadding",
        "raft_jax.sharding",
    ),
    "raft_jax.data": ("raft_jax.data", "raft_jax.tokens"),
    "raft_jax.sampling": (
        "raft_jax.accelerators",
        "raft_jax.sampling",
        "raft_jax.models",
        "raft_jax.data",
        "raft_jax.losses",
        "raft_jax.sharding",
        "raft_jax.tokens",
    ),
    "raft_jax.train.state": ("raft_jax.losses", "raft_jax.sharding"),
    "raft_jax.train.step": (
        "raft_jax.losses",
        "raft_jax.tokens",
        "raft_jax.unpadding",
        "raft_jax.sharding",
        "raft_jax.train.accumulate",
        "raft_jax.train.rollout_metrics",
        "raft_jax.train.state",
    ),
    "raft_jax.train.accumulate": ("raft_jax.tokens",),
    "raft_jax.train.rollout_metrics": ("raft_jax.losses", "raft_jax.tokens"),
    "raft_jax.methods": (),
    "raft_jax.plan.hlo": (),
    "raft_jax.plan.environment": ("raft_jax.gpu_environment", "raft_jax.plan.gpus"),
    "raft_jax.plan.gpus": (),
    "raft_jax.accelerators": (),
    "raft_jax.evaluate.statistics": (),
    "raft_jax.evaluate.agreement": (),
}
STAGES = ("raft_jax.refine", "raft_jax.evaluate", "raft_jax.report", "raft_jax.train")
# Third parties; where nothing is said, whatever the package depends on. The standard library is free.
THIRD_PARTIES = {
    "raft_jax.errors": set(),
    "raft_jax.files": {"pydantic"},
    "raft_jax.metrics": set(),
    "raft_jax.bucket": {"aiohttp", "etils", "fsspec", "gcsfs", "google", "jax"},
    "raft_jax.run_folder": set(),
    "raft_jax.scores": {"numpy"},
    "raft_jax.interrupt": set(),
    "raft_jax.terminal": set(),
    "raft_jax.sources": {"huggingface_hub"},
    "raft_jax.config": set(),
    "raft_jax.endpoint_config": set(),
    "raft_jax.trackers": set(),
    "raft_jax.config_file": {"omegaconf"},
    "raft_jax.settings_text": {"omegaconf", "yaml"},
    "raft_jax.stages": set(),
    "raft_jax.progress": {"rich"},
    "raft_jax.sharding": {"jax", "numpy"},
    "raft_jax.tokens": {"jax"},
    "raft_jax.unpadding": {"jax"},
    "raft_jax.host_memory": {"jax"},
    "raft_jax.losses": {"jax"},
    "raft_jax.train.state": {"jax", "optax"},
    "raft_jax.train.accumulate": {"jax"},
    "raft_jax.train.rollout_metrics": {"jax"},
    "raft_jax.train.step": {"jax", "optax"},
    "raft_jax.methods": set(),
    "raft_jax.plan.hlo": set(),
    "raft_jax.plan.environment": set(),
    "raft_jax.plan.gpus": set(),
    "raft_jax.accelerators": set(),
    "raft_jax.data.batches": {"numpy"},
    "raft_jax.data.prompts": {"jinja2"},
    "raft_jax.refine.ledger": set(),
    "raft_jax.evaluate.statistics": {"numpy", "scipy"},
    "raft_jax.evaluate.agreement": {"numpy"},
}


def imported(path: Path) -> set[str]:
    """Modules that a file names in its import statements, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from package import module` is an import of the module.
            found |= {full if (full := f"{node.module}.{name.name}") in OURS else node.module for name in node.names}
    return found


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def rule_of(module: str, rules: dict):
    """The rule with the longest name that covers a module."""
    names = [name for name in rules if is_in(module, name)]
    return rules[max(names, key=len)] if names else None


@pytest.mark.parametrize("module", OURS)
def test_a_module_imports_what_it_may(module):
    found = imported(OURS[module])
    ours = {name for name in found if is_in(name, "raft_jax") and name != "raft_jax"}
    assert ours <= OURS.keys()
    allowed = rule_of(module, ALLOWED)
    if allowed is not None:
        assert {name for name in ours if not any(is_in(name, package) for package in (*allowed, *LOW))} == set()
    for stage in STAGES:
        if is_in(module, stage):
            others = [other for other in STAGES if other != stage] + ["raft_jax.run", "raft_jax.cli"]
            if module == "raft_jax.train.loop":
                others = ["raft_jax.cli"]
            if module == "raft_jax.evaluate.judges":  # the judges of refinement judge answers, too
                ours = {name for name in ours if not is_in(name, "raft_jax.refine")}
            if is_in(module, "raft_jax.report"):  # functions of numbers
                ours = ours - {"raft_jax.evaluate.statistics"}
            if module == "raft_jax.report.flags":  # a leak or a loop is the same in both places
                ours = ours - {"raft_jax.refine.screen"}
            assert {name for name in ours if any(is_in(name, other) for other in others)} == set()
    third = {name.partition(".")[0] for name in found} - {"raft_jax"} - sys.stdlib_module_names
    assert "torch" not in third and "tensorflow" not in third
    if (expected := rule_of(module, THIRD_PARTIES)) is not None:
        assert third <= expected


def test_every_rule_is_about_something():
    for name in (*ALLOWED, *THIRD_PARTIES, *STAGES, *LOW):
        assert any(is_in(module, name) for module in OURS), name


def modules_after(program: str) -> set[str]:
    """Top-level modules that a fresh process holds after a program."""
    program += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_losses_pull_in_jax_and_nothing_else():
    extra = modules_after("import raft_jax.losses") - modules_after("import jax, jax.numpy")
    assert extra - sys.stdlib_module_names == {"raft_jax"}


def test_help_imports_nothing_slow():
    found = modules_after("from raft_jax.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass")
    assert not found & {"jax", "numpy", "yaml", "omegaconf", "rich", "transformers", "tokenizers", "optax", "flax"}


def test_config_imports_no_jax():
    found = modules_after("from raft_jax.config_file import load_config")
    assert not found & {"jax", "numpy", "transformers"}


def test_nothing_touches_a_device_at_import():
    # A platform that does not exist is noticed by the first thing that asks for a device.
    modules = ", ".join(name for name in OURS if name != "raft_jax.__main__")
    modules_after(f"import os; os.environ['JAX_PLATFORMS'] = 'none_such'\nimport {modules}")


def test_files_are_short_and_there_is_no_utils():
    for module, path in OURS.items():
        assert "utils" not in module
        assert len(path.read_text("utf-8").splitlines()) <= 500, path


def test_functions_are_short():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{path}: {node.name} has {lines} lines beside its docstring"
