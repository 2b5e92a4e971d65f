"""The scripts against a fake gcloud: what they print and run, when they ask, when they refuse."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_gcloud import CALLS, RUN, SCRIPTS, SLICE, WHERE, Cloud, commands, flag


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


# What is printed


@pytest.mark.parametrize("script", CALLS)
def test_help(cloud: Cloud, script: str) -> None:
    done = cloud.run(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"Usage: {script}")
    assert all(word in done.stdout for word in ("--dry-run", "--yes", "(NAME)", "(ZONE)", "(PROJECT)"))
    assert cloud.calls == []


@pytest.mark.parametrize("script", [*CALLS, "gke.sh"])
def test_help_names_every_flag(cloud: Cloud, script: str) -> None:
    text = (SCRIPTS / script).read_text()
    if "take_slice_setting" in text:
        text += (SCRIPTS / "slice.sh").read_text()
    if "take_source_setting" in text:
        text += "    --git)\n    --ref)\n    --storage)\n"
    flags = set(re.findall(r"^ +(--[a-z-]+)\) ", text, re.M)) | {"--name", "--dry-run", "--yes"}
    help_text = cloud.run(script, "--help").stdout
    assert sorted(flag for flag in flags if flag not in help_text) == []
    assert max(map(len, help_text.splitlines())) <= 125


@pytest.mark.parametrize("script", CALLS)
def test_dry_run_runs_nothing(cloud: Cloud, script: str) -> None:
    done = cloud.run(script, "--dry-run", *CALLS[script])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert cloud.calls == [] and not (cloud.folder / "a cache").exists()
    printed = commands(done.stdout)
    assert printed
    for command in printed:
        if command[0] == "gcloud":
            assert command[1:3] == ["compute", "tpus"]
            assert (flag(command, "zone"), flag(command, "project")) == ("us-west4-a", "us")


@pytest.mark.parametrize("script", ["create.sh", "run.sh", "logs.sh"])
def test_dry_run_prints_what_is_run(cloud: Cloud, script: str) -> None:
    printed = [command[1:] for command in commands(cloud.run(script, "--dry-run", *CALLS[script]).stdout)]
    ready = [["raft_jax w-0 idle shared\nraft_jax w-1 idle shared", 0], ["", 0]]
    cloud.answer({"queued-resources describe": [["ACTIVE", 0]], "tpu-vm ssh": ready})
    done = cloud.run(script, "--yes", *CALLS[script])
    assert done.returncode == 0, done.stderr
    assert cloud.calls == printed


def test_create_command(cloud: Cloud) -> None:
    done = cloud.run("create.sh", *SLICE, "--valid-until", "6h", "--dry-run", "--no-wait")
    assert commands(done.stdout) == [
        [
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "create",
            "slice",
            "--node-id=slice",
            "--accelerator-type=v5litepod-16",
            "--runtime-version=v2-alpha-tpuv5-lite",
            "--spot",
            "--valid-until-duration=6h",
            "--zone=us-west4-a",
            "--project=us",
        ]
    ]
    assert "16 chips on 4 workers, spot" in done.stdout and "billed" in done.stdout


# Setting, its value, and what gcloud is given. The track that has each flag is in the help of gcloud 528.0.0.
CREATE_SETTINGS = [
    ("NETWORK", "mine", "GA", ["--network=mine"]),
    ("SUBNETWORK", "sub", "GA", ["--subnetwork=sub"]),
    ("SERVICE_ACCOUNT", "a@b.example.org", "GA", ["--service-account=a@b.example.org"]),
    ("DATA_DISK", "source=projects/p/d,mode=read-only", "GA", ["--data-disk=source=projects/p/d,mode=read-only"]),
    ("VALID_UNTIL", "6h", "GA", ["--valid-until-duration=6h"]),
    ("RESERVED", "", "GA", ["--reserved"]),
    ("SPOT", "", "GA", ["--spot"]),
    ("NODE_COUNT", "2", "GA", ["--node-count=2", "--node-prefix=slice"]),
    ("AUTOCHECKPOINT_ENABLED", "", "alpha", ["--autocheckpoint-enabled"]),
    ("BOOT_DISK", "confidential-compute=True,kms-key=k", "alpha", ["--boot-disk=confidential-compute=True,kms-key=k"]),
    ("RESERVATION", "ours", "alpha", ["--reservation=ours"]),
    ("PROVISIONING_MODEL", "standard", "alpha", ["--provisioning-model=standard"]),
    ("PROVISIONING_MODEL", "SPOT", "alpha", ["--provisioning-model=spot", "--spot"]),
    ("ALPHA", "", "alpha", []),
]


@pytest.mark.parametrize("by_flag", [True, False], ids=["flag", "variable"])
@pytest.mark.parametrize(("setting", "value", "track", "expected"), CREATE_SETTINGS)
def test_create_settings(
    cloud: Cloud, setting: str, value: str, track: str, expected: list[str], by_flag: bool
) -> None:
    words, variables = [], {}
    if by_flag:
        words = [f"--{setting.lower().replace('_', '-')}", *([value] if value else [])]
    else:
        variables = {setting: value or "1"}
    arguments = [*WHERE, "--accelerator=v6e-16", *words, "--no-wait"]
    command = commands(cloud.run("create.sh", "--dry-run", *arguments, **variables).stdout)[0]
    done = cloud.run("create.sh", "--yes", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    assert cloud.calls == [command[1:]]
    tracked = ["gcloud", *(["alpha"] if track == "alpha" else []), "compute", "tpus", "queued-resources", "create"]
    assert command[: len(tracked) + 1] == [*tracked, "slice"]
    plain = {"--node-id=slice", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"}
    if setting == "NODE_COUNT":
        plain.remove("--node-id=slice")
    assert set(command[len(tracked) + 1 :]) == {*plain, *expected, "--zone=us-west4-a", "--project=us"}


def test_create_flex_start(cloud: Cloud) -> None:
    flex = ["--provisioning-model", "FLEX_START", "--max-run-duration", "8h"]
    done = cloud.run("create.sh", "--dry-run", *WHERE, "--accelerator=v6e-8", *flex)
    command = commands(done.stdout)[0]
    assert command[1] == "alpha" and "flex-start for 8h" in done.stdout
    assert (flag(command, "provisioning-model"), flag(command, "max-run-duration")) == ("flex-start", "8h")


def test_create_spot_with_autocheckpoint(cloud: Cloud) -> None:
    command = commands(cloud.run("create.sh", "--dry-run", *SLICE, "--autocheckpoint-enabled").stdout)[0]
    assert command[1] == "alpha"
    assert {"--spot", "--provisioning-model=spot", "--autocheckpoint-enabled"} <= set(command)


def test_create_passes_further_flags_on(cloud: Cloud) -> None:
    more = ["--", "--labels=team=a b", "--description", "it's"]
    done = cloud.run("create.sh", "--dry-run", *SLICE, *more, CREATE_FLAGS="--internal-ips --range=10.0.0.0/29")
    command = commands(done.stdout)[0]
    place = command.index("--spot") + 1
    assert command[place:-2] == ["--internal-ips", "--range=10.0.0.0/29", *more[1:]]


@pytest.mark.parametrize(
    ("given", "name", "runtime", "size"),
    [
        ("v4-8", "v4-8", "tpu-ubuntu2204-base", "4 chips on 1 worker"),
        ("v4-32", "v4-32", "tpu-ubuntu2204-base", "16 chips on 4 workers"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5", "64 chips on 16 workers"),
        ("v5e-1", "v5litepod-1", "v2-alpha-tpuv5-lite", "1 chip on 1 worker"),
        ("v5e-8", "v5litepod-8", "v2-alpha-tpuv5-lite", "8 chips on 1 worker"),
        ("v5litepod-256", "v5litepod-256", "v2-alpha-tpuv5-lite", "256 chips on 64 workers"),
        ("v6e-16", "v6e-16", "v2-alpha-tpuv6e", "16 chips on 4 workers"),
    ],
)
def test_accelerators(cloud: Cloud, given: str, name: str, runtime: str, size: str) -> None:
    done = cloud.run("create.sh", *WHERE, "--accelerator", given, "--dry-run")
    command = commands(done.stdout)[0]
    assert (flag(command, "accelerator-type"), flag(command, "runtime-version")) == (name, runtime)
    assert f"{name}: {size}, on-demand" in done.stdout and "--spot" not in command


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tpu7x-8", "needs GKE (gke.sh)"),
        ("TPU7x-128", "needs GKE (gke.sh)"),
        ("v3-8", "expected v4-N, v5e-N, v5p-N or v6e-N"),
        ("v5e-12", "1, 4, 8, 16, 32"),
        ("v4-12", "multiple of 8"),
        ("v5e-4x4", "4x4 is not a size"),
    ],
)
def test_refused_accelerators(cloud: Cloud, given: str, message: str) -> None:
    done = cloud.run("create.sh", *WHERE, "--yes", "--accelerator", given)
    assert done.returncode == 2 and given in done.stderr and message in done.stderr
    assert cloud.calls == []


def test_settings_from_the_environment(cloud: Cloud) -> None:
    settings = {
        "NAME": "mine",
        "ZONE": "europe-west4-b",
        "PROJECT": "us",
        "ACCELERATOR": "v6e-4",
        "RUNTIME_VERSION": "an-image",
        "SPOT": "1",
    }
    command = commands(cloud.run("create.sh", "--dry-run", "--zone=us-east5-b", **settings).stdout)[0]
    assert command[5] == "mine" and "--spot" in command
    assert flag(command, "zone") == "us-east5-b", "a flag wins over the environment"
    assert flag(command, "runtime-version") == "an-image"


def test_quoting_reaches_the_worker_unchanged(cloud: Cloud) -> None:
    strange = ["configs/my run.yaml", "run_dir=/mnt/it's $HOME", 'data.path=/a "b"; rm -rf *', "x=`id`\\"]
    where = ["--name", "a 'b' $c", "--zone=us-west4-a", "--project", "pro ject"]
    done = cloud.run("run.sh", "--dry-run", *where, *strange)
    assert done.returncode == 0, done.stderr
    start = commands(done.stdout)[-1]
    assert start[5] == "a 'b' $c" and flag(start, "project") == "pro ject"
    assert shlex.split(flag(start, "command"))[-5:] == ["start", *strange]
    read_back = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {done.stdout.splitlines()[-2]}"], text=True, capture_output=True, check=True
    ).stdout.splitlines()
    assert read_back == start, "bash reads the printed line like Python's shlex"


# Refusals


@pytest.mark.parametrize("script", CALLS)
def test_missing_settings(cloud: Cloud, script: str) -> None:
    done = cloud.run(script, "--yes")
    assert done.returncode == 2
    for setting in ("--name (or the variable NAME)", "--zone", "--project"):
        assert setting in done.stderr
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("create.sh", [*SLICE, "extra"], "unexpected argument extra"),
        ("create.sh", [*SLICE, "--acelerator", "v4-8"], "unknown option --acelerator"),
        ("create.sh", [*WHERE, "--accelerator"], "--accelerator needs a value"),
        ("create.sh", ["--name", "--zone", "a"], "--name needs a value"),
        ("setup.sh", [*WHERE, "--storage", "s3://bucket"], "expected gs://BUCKET"),
        ("setup.sh", [*WHERE, "--storage", "bucket"], "expected gs://BUCKET"),
        ("run.sh", WHERE, "missing: CONFIG"),
        ("run.sh", [*WHERE, "configs/a.yaml"], "missing: run_dir="),
        ("run.sh", [*WHERE, "configs/a.yaml", "run_dir=runs/a"], "not an absolute path"),
        ("run.sh", [*WHERE, "configs/a.yaml", "run_dir=gs://b/a"], "setup.sh --storage gs://BUCKET"),
        ("run.sh", [*WHERE, *RUN, "--verbose"], "expected KEY=VALUE"),
        ("resume.sh", SLICE, "missing: CONFIG"),
        ("resume.sh", [*SLICE, "configs/a.yaml"], "missing: run_dir="),
        ("resume.sh", [*SLICE, "--storage=x", *RUN], "expected gs://BUCKET"),
        ("logs.sh", [*WHERE, "--worker", "first"], "neither a number nor all"),
        ("logs.sh", [*WHERE, "--run-dir", "runs/a"], "--run-dir runs/a is not an absolute path"),
        ("run.sh", [*WHERE, "--stop", "--stop-seconds", "soon"], "--stop-seconds soon"),
        ("run.sh", [*WHERE, "--stop", *RUN], "--stop takes no config"),
        ("run.sh", [*WHERE, "--log-seconds", "0 ; id", *RUN], "--log-seconds 0 ; id"),
        ("create.sh", [*SLICE, "--node-count", "1"], "--node-count 1: expected 2 or more"),
        ("create.sh", [*SLICE, "--provisioning-model", "cheap"], "--provisioning-model cheap: expected standard, spot"),
        ("create.sh", [*SLICE, "--reserved"], "--spot excludes --reserved"),
        ("create.sh", [*WHERE, "--accelerator=v6e-8", "--provisioning-model=flex-start"], "needs --max-run-duration"),
        ("create.sh", [*SLICE, "--max-run-duration=8h"], "only with --provisioning-model flex-start"),
        ("create.sh", [*SLICE, "--provisioning-model=reservation-bound"], "needs --reservation NAME"),
        ("resume.sh", [*SLICE, "--node-count", "2", *RUN], "works on a single slice"),
        ("watch.sh", [*SLICE, "--max-resumes", "2"], "missing: CONFIG"),
        ("watch.sh", [*SLICE, *RUN], "missing: a budget, --max-resumes, --budget-hours or --deadline"),
        ("watch.sh", [*SLICE, "--max-resumes", "some", *RUN], "--max-resumes some is not a number"),
        ("watch.sh", [*SLICE, "--budget-hours", "0", *RUN], "--budget-hours 0 is not a number of hours"),
        ("watch.sh", [*SLICE, "--deadline", "tomorrow", *RUN], "--deadline tomorrow: expected a time in UTC"),
        ("watch.sh", [*SLICE, "--max-resumes=2", "configs/a.yaml"], "missing: run_dir="),
    ],
)
def test_bad_arguments(cloud: Cloud, script: str, arguments: list[str], message: str) -> None:
    for mode in ("--yes", "--dry-run"):
        done = cloud.run(script, mode, *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert cloud.calls == []


def test_neither_on_nor_off(cloud: Cloud) -> None:
    for setting in ("SPOT", "RESERVED", "AUTOCHECKPOINT_ENABLED", "ALPHA"):
        done = cloud.run("create.sh", "--yes", *WHERE, "--accelerator=v4-8", **{setting: "maybe"})
        assert done.returncode == 2 and f"{setting} maybe" in done.stderr and cloud.calls == []


def test_gcloud_not_installed(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "tr"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        [SCRIPTS / "delete.sh", "--yes", *WHERE], env={"PATH": str(tools)}, text=True, capture_output=True
    )
    assert done.returncode == 2 and "install the Google Cloud CLI" in done.stderr


# The question


@pytest.mark.parametrize("script", ["create.sh", "delete.sh"])
def test_without_terminal_and_yes_it_refuses(cloud: Cloud, script: str) -> None:
    done = cloud.run(script, *CALLS[script])
    assert done.returncode == 2 and "pass --yes" in done.stderr
    assert cloud.calls == []


@pytest.mark.parametrize("script", ["create.sh", "delete.sh"])
@pytest.mark.parametrize("reply", ["", "n", "maybe"])
def test_not_confirmed(cloud: Cloud, script: str, reply: str) -> None:
    done = cloud.run_on_terminal(reply, script, *CALLS[script])
    assert done.returncode == 3 and "Nothing was done" in done.stderr
    assert cloud.calls == []


def test_confirmed(cloud: Cloud) -> None:
    cloud.answer({"queued-resources describe": [["ACTIVE", 0]]})
    done = cloud.run_on_terminal("y", "create.sh", *SLICE)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["queued-resources create", "queued-resources describe"]


# Creating and deleting


def test_create_waits(cloud: Cloud) -> None:
    states = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    cloud.answer({"queued-resources describe": [[state, 0] for state in states]})
    done = cloud.run("create.sh", "--yes", *SLICE)
    assert done.returncode == 0, done.stderr
    assert re.findall(r": ([A-Z_]+)$", done.stdout, re.M) == states[1:], "a state is said once"


def test_create_fails(cloud: Cloud) -> None:
    cloud.answer({"queued-resources create": [["quota", 7]]})
    assert cloud.run("create.sh", "--yes", *SLICE).returncode == 7
    assert cloud.verbs == ["queued-resources create"]


def test_create_gives_up_when_it_cannot_look(cloud: Cloud) -> None:
    cloud.answer({"queued-resources describe": [["", 1], ["ACCEPTED", 0], ["", 1]]})
    assert cloud.run("create.sh", "--yes", *SLICE).returncode == 1
    assert cloud.verbs.count("queued-resources describe") == 7, "five misses in a row"


def test_create_is_told_that_the_request_failed(cloud: Cloud) -> None:
    cloud.answer({"queued-resources describe": [["FAILED", 0]]})
    done = cloud.run("create.sh", "--yes", *SLICE)
    assert done.returncode == 1 and "ended as FAILED" in done.stderr


@pytest.mark.parametrize(
    ("queued", "vm", "deleted"),
    [
        ("slice\tACTIVE", "slice\tREADY", ["queued-resources delete"]),
        ("slice\tWAITING_FOR_RESOURCES", "", ["queued-resources delete"]),
        ("", "slice\tREADY", ["tpu-vm delete"]),
        ("other\tACTIVE\nslice-2\tACTIVE", "my-slice\tREADY", []),
    ],
)
def test_delete(cloud: Cloud, queued: str, vm: str, deleted: list[str]) -> None:
    cloud.answer({"queued-resources list": [[queued, 0], ["", 0]], "tpu-vm list": [[vm, 0], ["", 0]]})
    done = cloud.run("delete.sh", "--yes", *WHERE)
    assert done.returncode == 0, done.stderr
    assert [verb for verb in cloud.verbs if "delete" in verb] == deleted
    assert all(call[4] == "slice" and "--quiet" in call for call in cloud.calls if call[3] == "delete")
    assert ("--force" in str(cloud.calls)) == (deleted == ["queued-resources delete"])


def test_delete_says_when_something_is_left(cloud: Cloud) -> None:
    cloud.answer({"queued-resources list": [["slice\tACTIVE", 0], ["slice\tSUSPENDING", 0]]})
    done = cloud.run("delete.sh", "--yes", *WHERE)
    assert done.returncode == 1 and "may still be billed" in done.stderr


@pytest.mark.parametrize("script", ["delete.sh", "resume.sh"])
def test_a_failed_look_is_not_taken_for_nothing_there(cloud: Cloud, script: str) -> None:
    cloud.answer({"queued-resources list": [["", 5]]})
    done = cloud.run(script, "--yes", *CALLS[script], REF="HEAD", GIT="https://example.org/raft_jax")
    assert done.returncode == 5
    assert cloud.verbs == ["queued-resources list"]
