"""A gcloud that records its calls, answers as it is told, and has folders for workers."""

from __future__ import annotations

import json
import os
import pty
import shlex
import stat
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "tpu_scripts"
WHERE = ["--name", "slice", "--zone", "us-west4-a", "--project", "us"]
SLICE = [*WHERE, "--accelerator", "v5e-16", "--spot"]
RUN = ["configs/a.yaml", "run_dir=/mnt/raft_jax/one"]
CALLS = {
    "create.sh": SLICE,
    "setup.sh": WHERE,
    "run.sh": [*WHERE, *RUN],
    "logs.sh": WHERE,
    "resume.sh": [*SLICE, *RUN],
    "watch.sh": [*SLICE, "--max-resumes", "2", *RUN],
    "delete.sh": WHERE,
}

# Records its arguments, then answers from answers.json: {"tpu-vm list": [[stdout, exit code], ...]}, the last
# again and again. Where there are homes of workers, scp copies into them and ssh runs there.
FAKE_GCLOUD = """#!{python} -IS
import json, os, sys
here = os.path.dirname(os.path.realpath(__file__))
arguments = sys.argv[1:]
with open(here + "/calls.jsonl", "a") as calls:
    calls.write(json.dumps(arguments) + "\\n")
arguments = [word for word in arguments if word != "alpha"]
verb = " ".join(arguments[2:4])
flags = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
names = sorted(os.listdir(here + "/workers")) if os.path.isdir(here + "/workers") else []
homes = [here + "/workers/" + name for name in names]
if homes and verb == "tpu-vm scp":
    import shutil
    for home in homes:
        shutil.copy(arguments[4], home + "/" + arguments[5].partition(":")[2])
elif homes and verb == "tpu-vm ssh":
    import subprocess
    chosen = homes if flags["worker"] == "all" else [homes[int(flags["worker"])]]
    shells = []
    for home in chosen:
        path = here + "/worker_bin" + os.pathsep + os.environ["PATH"]
        script = "export HOSTNAME=" + os.path.basename(home) + "; " + flags["command"]
        environment = dict(os.environ, HOME=home, PATH=path)
        shells.append(subprocess.Popen(["bash", "-c", script], cwd=home, env=environment))
    sys.exit(max(shell.wait() for shell in shells))
else:
    with open(here + "/answers.json") as told:
        answers = json.load(told)
    if verb in answers:
        output, code = answers[verb].pop(0) if len(answers[verb]) > 1 else answers[verb][0]
        with open(here + "/answers.json", "w") as told:
            json.dump(answers, told)
        print(output)
        sys.exit(code)
"""


class Cloud:
    """A folder with the fake gcloud, its answers and its record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answer({})
        self.write("gcloud", FAKE_GCLOUD.format(python=sys.executable))

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def answer(self, answers: dict[str, list]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers))

    @property
    def calls(self) -> list[list[str]]:
        record = self.folder / "calls.jsonl"
        return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []

    @property
    def verbs(self) -> list[str]:
        return [" ".join([word for word in call if word != "alpha"][2:4]) for call in self.calls]

    @property
    def steps(self) -> list[str]:
        """What resume.sh and watch.sh did that changes something."""
        steps = []
        for call in self.calls:
            words = shlex.split(flag(call, "command")) if call[3] == "ssh" else [call[3]]
            steps += [word for word in words if word in {"create", "delete", "install", "stop", "start"}]
        return steps

    def environment(self, **settings: str) -> dict[str, str]:
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        cache = str(self.folder / "a cache")
        fixed = {"PATH": path, "HOME": str(self.folder), "XDG_CACHE_HOME": cache, "POLL_SECONDS": "0"}
        return {**fixed, **settings}

    def run(self, script: str | Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [SCRIPTS / script, *arguments],
            env=self.environment(**settings),
            text=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )

    def run_on_terminal(self, reply: str, script: str, *arguments: str) -> subprocess.CompletedProcess:
        ours, theirs = pty.openpty()
        try:
            os.write(ours, f"{reply}\n".encode())
            return subprocess.run(
                [SCRIPTS / script, *arguments],
                env=self.environment(),
                text=True,
                stdin=theirs,
                capture_output=True,
                timeout=60,
            )
        finally:
            os.close(ours)
            os.close(theirs)


def commands(output: str) -> list[list[str]]:
    """The commands of a dry run, read back as a shell would."""
    return [shlex.split(line) for line in output.splitlines() if line and not line.startswith("#")]


def flag(command: list[str], name: str) -> str:
    return next(word.partition("=")[2] for word in command if word.startswith(f"--{name}="))
