"""Run folders in a bucket, against an emulator of Google's storage on this machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import tiny
from storage_server import StorageServer

from raft_jax import bucket
from raft_jax.checkpoint import Checkpoints, remove_steps
from raft_jax.errors import InputError

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it asks Google's servers of what kind a bucket is
pytest.importorskip("gcsfs", reason="the extra [gcs] is not installed")

TIMES = ("seconds", "rollout_seconds", "tokens_per_second")


class Objects:
    """The objects below a folder of the bucket `runs`."""

    def __init__(self, server: StorageServer, folder: str):
        self.server, self.folder = server, folder

    def __getitem__(self, name: str) -> bytes:
        return self.server.buckets["runs"][f"{self.folder}/{name}"].content

    def generation(self, name: str) -> int:
        return self.server.buckets["runs"][f"{self.folder}/{name}"].generation

    def names(self) -> set[str]:
        prefix = self.folder + "/"
        return {name.removeprefix(prefix) for name in list(self.server.buckets["runs"]) if name.startswith(prefix)}


@pytest.fixture(scope="module")
def storage():
    """A server with the empty bucket `runs`."""
    with StorageServer("runs") as server:
        yield server


@pytest.fixture
def machine(storage, program_environment, tmp_path):
    """`machine(name, *arguments)`: the program on a machine of its own, which is its cache folder; it is waited for."""

    def start(name: str, *arguments: object) -> subprocess.Popen:
        environment = program_environment | storage.environment | {"XDG_CACHE_HOME": str(tmp_path / name)}
        command = [sys.executable, "-m", "raft_jax", *map(str, arguments)]
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path
        )

    def run(name: str, *arguments: object, code: int = 0) -> str:
        process = start(name, *arguments)
        output = process.communicate(timeout=600)[0]
        assert process.returncode == code, output
        return output

    run.start = start
    return run


def results(read) -> dict[str, object]:
    """What a run has made, without its times and places; `read(name)` is the content of a file."""
    lines = [json.loads(line) for line in read("raft/metrics.jsonl").splitlines()]
    return {
        "metrics": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
        "weights": read("raft/hf/model.safetensors"),
        "refined": read("refined/refined.jsonl"),
        "scores": json.loads(read("evaluation.json"))["models"],
    }


def names(folder: Path) -> set[str]:
    """The files of a folder without those that belong to one machine."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


def without_checkpoints(files: set[str]) -> set[str]:
    return {name for name in files if "/checkpoints/" not in name}


def test_a_run_in_a_bucket_is_that_in_a_folder_also_after_a_kill_and_on_other_machines(machine, storage, tmp_path):
    """Killed in training, and gone on with on a machine that has nothing of it; then evaluated on a third."""
    config = tiny.write_run(tmp_path, train={"max_steps": 4, "checkpoint_every": 1, "keep_finished": True})
    machine("one", "run", config)
    url, there = "run_dir=gs://runs/a folder/run", Objects(storage, "a folder/run")
    process = machine.start("two", "run", config, url)
    deadline = time.monotonic() + 300
    while "raft/checkpoints/2.sha256.json" not in there.names() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -9, process.stdout.read()
    machine("three", "train", config, url)
    output = machine("four", "run", config, url)
    assert "gs://runs/a folder/run/report.html" in output
    assert results(there.__getitem__) == results(lambda name: (tmp_path / "run" / name).read_bytes())
    assert without_checkpoints(there.names()) == without_checkpoints(names(tmp_path / "run"))
    kept = {name.split("/")[2] for name in there.names() if name.startswith("raft/checkpoints/")}
    assert {name for name in kept if "damaged" not in name} == {"3", "3.sha256.json", "4", "4.sha256.json"}
    # Checkpoints are in the bucket only.
    assert not (tmp_path / "four/raft_jax/buckets/runs/a folder/run/raft/checkpoints").exists()
    # Verbs that only read, on a machine that has nothing.
    assert "disk" in machine("five", "check", config, url)
    assert "RAFT" in machine("five", "generate", config, url, "Why?", "--max-new-tokens", 2)
    generation = there.generation("report.html")
    assert machine("six", "report", config, url).strip() == "gs://runs/a folder/run/report.html"
    assert there.generation("report.html") > generation


def test_what_cannot_be_used_is_said_in_one_line(machine, tmp_path):
    config = tiny.write_run(tmp_path)
    for place, words in (
        ("gs://runs", "expected gs://BUCKET/FOLDER"),
        ("gs://runs/../x", "expected gs://BUCKET/FOLDER"),
        ("gs://nothing-there/run", "gs://nothing-there/run: cannot be read or written"),
    ):
        for verb in ("check", "run"):
            (line,) = machine("one", verb, config, f"run_dir={place}", code=2).splitlines()[-1:]
            assert words in line, line


@pytest.fixture
def here(storage, monkeypatch, tmp_path):
    """A folder of the bucket: its URL, its copy in this process, and its objects."""
    for name, value in (storage.environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bucket, "_seen", {})
    url = f"gs://runs/{tmp_path.name}"
    return url, bucket.local_path(url), Objects(storage, tmp_path.name)


def test_what_changes_is_sent_and_what_is_gone_is_removed(here):
    url, copy, objects = here
    with bucket.kept(url, several=False):
        (copy / "a/b").mkdir(parents=True)
        for name in ("new", "a/b/old", "a/x.partial", "a/best"):
            (copy / name).write_text(name)
        bucket.send(copy)
        assert objects.names() == {"new", "a/b/old", "a/best"}
        before = objects.generation("new")
        (copy / "a/b/old").write_text("other")
        (copy / "a/best").unlink()
        bucket.send(copy)
        assert objects.names() == {"new", "a/b/old"} and objects["a/b/old"] == b"other"
        assert objects.generation("new") == before
        (copy / "last").write_bytes(b"sent at the end" * 10**6)  # in several parts
    assert objects.names() == {"new", "a/b/old", "last"} and len(objects["last"]) == 15 * 10**6


def test_files_and_folders_that_vanish_meanwhile_are_no_error(here, monkeypatch):
    """As when an export is renamed to its place while the thread looks for what has changed."""
    url, copy, objects = here
    with bucket.kept(url, several=False):
        (copy / "hf").mkdir()
        for name in ("hf/one", "hf/two", "other"):
            (copy / name).write_text(name)
        walk = os.walk

        def walked(folder):
            for entry in walk(folder):
                if entry[0] == str(copy):
                    yield entry
                    (copy / "hf").rename(copy / "hf.partial")
                else:
                    yield entry

        with monkeypatch.context() as patch:
            patch.setattr(os, "walk", walked)
            bucket.send(copy)
        assert objects.names() == {"other"}
        (copy / "hf.partial").rename(copy / "hf")
    assert objects.names() == {"other", "hf/one", "hf/two"}


def test_files_are_sent_oldest_first(here, monkeypatch):
    """A manifest is the newest of its files, and says that the others are there."""
    url, copy, _ = here
    sent = []
    monkeypatch.setattr(bucket, "_send_file", lambda path, seen: sent.append(path.name))
    with bucket.kept(url, several=False):
        for age, name in enumerate(("manifest", "rows", "first")):
            (copy / name).write_text(name)
            os.utime(copy / name, (1e9 - age, 1e9 - age))
        bucket.send(copy)
    assert sent[:3] == ["first", "rows", "manifest"]


def test_the_bucket_is_right_when_a_command_begins(here):
    """What another machine wrote replaces the copy's, what it removed goes, and equal files are left alone."""
    url, copy, objects = here
    with bucket.kept(url, several=False):
        for name in ("same", "changed", "sub/removed"):
            (copy / name).parent.mkdir(exist_ok=True)
            (copy / name).write_text("as it was")
    bucket._seen.clear()  # another process
    untouched = (copy / "same").stat().st_ino
    objects.server.put("runs", f"{objects.folder}/changed", b"by another")
    objects.server.put("runs", f"{objects.folder}/new/file", b"by another")
    del objects.server.buckets["runs"][f"{objects.folder}/sub/removed"]
    with bucket.kept(url, writes=False, several=False):
        assert names(copy) == {"same", "changed", "new/file"} and not (copy / "sub").exists()
        assert (copy / "changed").read_text() == (copy / "new/file").read_text() == "by another"
        assert (copy / "same").stat().st_ino == untouched
        # A second command on this machine takes the copy as it is.
        (copy / "changed").write_text("in use")
        child = (
            "from raft_jax import bucket\n"
            f"with bucket.kept({url!r}, several=False): (bucket.local_path({url!r}) / 'page').write_text('its own')"
        )
        before = objects.server.generation
        subprocess.run([sys.executable, "-c", child], check=True, env=os.environ)
        assert (copy / "changed").read_text() == "in use"
        assert objects["page"] == b"its own" and objects["changed"] == b"by another"
        assert objects.server.generation == before + 2  # that page, and the test whether the bucket can be written


def test_a_bucket_that_cannot_be_written_for_a_while(here, storage, monkeypatch, capsys):
    """Before a command it is an error; within, it is said once and tried again; at its end, it says where files are."""
    url, copy, objects = here
    monkeypatch.setattr(bucket, "EVERY", 0.05)
    monkeypatch.setattr(storage, "refuses", True)
    with pytest.raises(InputError, match=f"{url}: cannot be read or written .*may not write"):
        bucket.kept(url, several=False).__enter__()
    storage.refuses = False
    with bucket.kept(url, several=False):
        storage.refuses = True
        (copy / "file").write_text("x")
        time.sleep(1)
        assert capsys.readouterr().err.count("it is tried again") == 1
        storage.refuses = False
        deadline = time.monotonic() + 30
        while "file" not in objects.names():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with pytest.raises(InputError, match=f"what was not sent is in {copy}"), bucket.kept(url, several=False):
        (copy / "last").write_text("x")
        storage.refuses = True
    storage.refuses = False
    with pytest.raises(KeyError), bucket.kept(url, several=False):  # the command's own error goes first
        (copy / "last").write_text("x")
        storage.refuses = True
        raise KeyError
    assert "what was not sent is in" in capsys.readouterr().err


def test_checkpoints_in_a_bucket(here, storage, monkeypatch, capsys):
    """What cannot be read is not taken for damaged; what is damaged is moved aside, and the step before is restored."""
    url, copy, objects = here
    checkpoints = Checkpoints(copy / "sft/checkpoints")
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.full(1000, step)})
    checkpoints.wait()
    like = {"x": jnp.zeros(1000, int)}
    before = objects.names()
    assert not any(name.startswith("sft/checkpoints/1") for name in before)
    monkeypatch.setattr(storage, "unreadable", "3.sha256.json")
    with pytest.raises(InputError, match=r"checkpoints.*: cannot be read .*may not read.*nothing was removed"):
        checkpoints.restore(like)
    assert objects.names() == before
    storage.unreadable = ""
    name = max((name for name in before if name.startswith("sft/checkpoints/3/")), key=lambda name: len(objects[name]))
    content = bytearray(objects[name])
    content[len(content) // 2] ^= 1
    storage.put("runs", f"{objects.folder}/{name}", content)
    step, state = checkpoints.restore(like)
    assert step == 2 and state["x"].tolist() == [2] * 1000
    assert f"{url}/sft/checkpoints/3: damaged or unfinished" in capsys.readouterr().err
    checkpoints.close()
    remove_steps(copy / "sft/checkpoints")
    assert {name.split("/")[2] for name in objects.names()} == {"damaged-3", "damaged-3.sha256.json"}


def test_without_gcsfs_the_error_names_the_extra(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"raft-jax\[gcs\]"), bucket.kept(here[0], several=False):
        pass


def test_an_object_with_a_name_that_leads_elsewhere_is_left_alone(monkeypatch):
    """A name with two points is legal in a bucket."""
    listing = {f"runs/one/{name}": {"md5Hash": "x"} for name in ("../../escaped", "a/../../b", "a..b")}
    file_system = SimpleNamespace(find=lambda path, detail: listing)
    monkeypatch.setattr(bucket, "_file_system", lambda url: file_system)
    assert bucket._objects("gs://runs/one") == {"a..b": "x"}
