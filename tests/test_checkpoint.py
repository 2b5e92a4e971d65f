"""Checkpoints: what was saved comes back bit by bit, and what is damaged is never restored."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from raft_jax.checkpoint import Checkpoints, remove_steps
from raft_jax.errors import InputError
from raft_jax.sharding import make_mesh


class State(NamedTuple):
    step: Any
    params: dict
    moments: tuple


def state_of(step: int) -> State:
    random = np.random.default_rng(step)
    return State(
        jnp.int32(step),
        {"matrix_DF": jnp.float32(random.normal(size=(8, 16))), "half": jnp.full(5, step / 3, jnp.bfloat16)},
        (jnp.asarray(random.integers(0, 99, 3)), jnp.float32(0.1 * step)),
    )


LIKE = jax.tree.map(jnp.zeros_like, state_of(0))


def restore(folder, like=LIKE):
    checkpoints = Checkpoints(folder)
    found = checkpoints.restore(like)
    checkpoints.close()
    return found


def assert_is(found, step: int) -> None:
    assert found is not None and found[0] == step
    for array, expected in zip(jax.tree.leaves(found[1]), jax.tree.leaves(state_of(step)), strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    assert isinstance(found[1], State)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 2 and 4, once; tests damage copies."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (2, 4):
        checkpoints.save(step, state_of(step))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def test_nothing_there(tmp_path):
    assert restore(tmp_path / "new") is None


def test_the_newest_step_comes_back(folder):
    assert_is(restore(folder), 4)


def test_old_steps_go_with_their_manifests(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10):
        checkpoints.save(step, state_of(step))
        assert_is(checkpoints.restore(LIKE), step)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "10.sha256.json", "2", "2.sha256.json"]


@pytest.mark.parametrize("place", ["sha256_of", "os.replace"])
def test_killed_before_the_manifest_with_one_step_kept(tmp_path, monkeypatch, place):
    """The arrays of the new step are there, its manifest is not: the old step must be."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (2, 4):
        checkpoints.save(step, state_of(step))
    checkpoints.wait()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"raft_jax.checkpoint.{place}", killed)
        checkpoints.save(6, state_of(6))
        checkpoints.wait()
    assert (tmp_path / "6").is_dir() and not (tmp_path / "6.sha256.json").exists()
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert_is(checkpoints.restore(LIKE), 4)
    checkpoints.save(6, state_of(6))
    checkpoints.close()
    assert_is(restore(tmp_path), 6)
    assert not (tmp_path / "4").exists() and not (tmp_path / "4.sha256.json").exists()


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    """The saved numbers are those at the call, also where the next step overwrites them at once."""
    size = 1 << 22
    step = jax.jit(lambda x: 2 * x + 1, donate_argnums=0)
    state, checkpoints = jnp.arange(size, dtype=jnp.float32), Checkpoints(tmp_path)
    for number in (1, 2, 3):
        expected = np.array(state)
        checkpoints.save(number, {"x": state})
        for _ in range(3):
            state = step(state)
        _, found = checkpoints.restore({"x": jnp.zeros(size)})
        np.testing.assert_array_equal(found["x"], expected)
    checkpoints.close()


def test_a_save_that_fails_is_told_at_the_next_call(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("raft_jax.checkpoint.sha256_of", lambda path: (_ for _ in ()).throw(OSError(28, "disk full")))
        checkpoints.save(2, state_of(2))
        with pytest.raises(OSError, match="disk full"):
            checkpoints.save(4, state_of(4))
    checkpoints.save(4, state_of(4))
    checkpoints.close()
    assert_is(restore(tmp_path), 4)


SAVES = """
import sys
import jax.numpy as jnp
from pathlib import Path
from raft_jax.checkpoint import Checkpoints

like = {"x": jnp.zeros(1 << 20), "y": jnp.zeros(1 << 18)}
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1)
found = checkpoints.restore(like)
if found:
    assert all(bool((array == found[0]).all()) for array in found[1].values()), found
print("begins", found[0] if found else 0, flush=True)
for step in range(found[0] + 1 if found else 1, 10_000):
    checkpoints.save(step, {name: jnp.full_like(array, step) for name, array in like.items()})
    print("saves", step, flush=True)
"""


@pytest.mark.slow
def test_killed_in_twelve_moments_of_a_save(tmp_path):
    """At most the save that was in flight is lost, and what is restored is whole."""
    random, last = np.random.default_rng(0), 0
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", SAVES, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        begins = int(process.stdout.readline().split()[1])
        assert begins >= last - 1
        last = begins
        for _ in range(int(random.integers(1, 4))):
            last = int(process.stdout.readline().split()[1])
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        rest, _ = process.communicate()
        last = max([last, *(int(line.split()[1]) for line in rest.splitlines())])
    assert last > 12 and not list(tmp_path.glob("damaged-*/*damaged*"))


def data_files(folder):
    return sorted(path for path in (folder / "4").rglob("*") if path.is_file())


def test_a_flipped_bit_anywhere_falls_back(saved, tmp_path, capsys):
    names = [path.relative_to(saved) for path in data_files(saved)]
    assert len(names) > 4
    for index, name in enumerate(names):
        folder = shutil.copytree(saved, tmp_path / str(index))
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        assert_is(restore(folder), 2)
        assert f"{folder / '4'}: damaged or unfinished; falling back" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        "file gone",
        "file more",
        "manifest gone",
        "manifest cut",
        "manifest odd",
        "manifest a list",
        "manifest without arrays",
        "manifest not text",
        "manifest deep",
    ],
)
def test_other_damage_falls_back_and_the_run_goes_on(folder, damage):
    largest = max(data_files(folder), key=lambda path: path.stat().st_size)
    manifest = folder / "4.sha256.json"
    if damage == "truncated":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif damage == "file gone":
        largest.unlink()
    elif damage == "file more":
        (folder / "4" / "more").write_text("")
    elif damage == "manifest gone":  # killed between the data and the manifest
        manifest.unlink()
    elif damage == "manifest cut":
        manifest.write_bytes(manifest.read_bytes()[:-3])
    elif damage == "manifest not text":
        manifest.write_bytes(b"\xff\xfe")
    elif damage == "manifest deep":
        manifest.write_text("[" * 100_000)
    elif damage == "manifest without arrays":
        manifest.write_text(json.dumps({"files": json.loads(manifest.read_text())["files"]}))
    else:
        manifest.write_text(json.dumps([] if damage == "manifest a list" else {}))
    checkpoints = Checkpoints(folder)
    assert_is(checkpoints.restore(LIKE), 2)
    assert not (folder / "4").exists() and not manifest.exists()
    # Nothing of it is lost, and Orbax does not take it for a step.
    assert len(list((folder / "damaged-4").rglob("*"))) > 4
    assert (folder / "damaged-4.sha256.json").exists() == (damage != "manifest gone")
    for step in (4, 6):
        checkpoints.save(step, state_of(step))
    assert_is(checkpoints.restore(LIKE), 6)
    checkpoints.close()
    assert_is(restore(folder), 6)


def test_every_step_damaged(folder, capsys):
    for manifest in folder.glob("*.sha256.json"):
        manifest.unlink()
    assert restore(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == ["damaged-2", "damaged-4"]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{folder / '4'}: damaged or unfinished; falling back to the step before (")
    assert first.endswith(f"(it is moved to {folder / 'damaged-4'})")
    assert last.startswith(f"{folder / '2'}: ") and "; training begins at step 0 (" in last


def test_a_step_that_is_damaged_again_gets_a_place_of_its_own(folder):
    (folder / "damaged-4").mkdir()
    (folder / "4.sha256.json").unlink()
    assert_is(restore(folder), 2)
    assert (folder / "damaged-4-2").is_dir() and not list((folder / "damaged-4").iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("place", ["manifest", "array", "folder"])
def test_what_cannot_be_read_is_not_taken_for_damaged(folder, monkeypatch, number, place):
    before = sorted(folder.rglob("*"))
    refused = {"manifest": folder / "4.sha256.json", "array": data_files(folder)[0], "folder": folder / "4"}[place]

    def failing(function):
        def call(path, *args, **kwargs):
            if str(path) == str(refused):
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *args, **kwargs)

        return call

    checkpoints = Checkpoints(folder)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", failing(pathlib.Path.open))
        patch.setattr(os, "scandir", failing(os.scandir))
        with pytest.raises(InputError) as caught:
            checkpoints.restore(LIKE)
    message = str(caught.value)
    assert message.startswith(f"{refused}: cannot be read ({os.strerror(number)}, {errno.errorcode[number]})")
    assert "nothing was removed" in message and "\n" not in message
    assert sorted(folder.rglob("*")) == before
    checkpoints.close()
    assert_is(restore(folder), 4)


def test_the_steps_of_a_finished_training_go_but_not_what_was_moved_aside(folder):
    (folder / "4.sha256.json").unlink()
    assert_is(restore(folder), 2)
    remove_steps(folder)
    assert [path.name for path in folder.iterdir()] == ["damaged-4"]
    shutil.rmtree(folder / "damaged-4")
    remove_steps(folder)
    assert not folder.exists()
    remove_steps(folder)


def test_an_unfinished_save_is_passed_over(folder):
    """kill -9 in the middle of a save leaves a temporary folder behind, and perhaps half a manifest."""
    shutil.copytree(folder / "4", folder / "6.orbax-checkpoint-tmp")
    (folder / "6.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").unlink()
    (folder / "6.sha256.partial").write_text("{")
    checkpoints = Checkpoints(folder)
    assert_is(checkpoints.restore(LIKE), 4)
    checkpoints.save(6, state_of(6))
    assert_is(checkpoints.restore(LIKE), 6)
    checkpoints.close()


def test_onto_another_mesh_and_back(folder):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    whole, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    placed = jax.tree.map(lambda array: jax.device_put(array, cut if array.ndim == 2 else whole), LIKE)
    checkpoints = Checkpoints(folder)
    step, found = checkpoints.restore(placed)
    assert found.params["matrix_DF"].sharding == cut
    assert found.params["matrix_DF"].addressable_shards[0].data.shape == (4, 8)
    assert_is((step, found), 4)
    checkpoints.save(6, jax.tree.map(lambda array, like: jax.device_put(array, like.sharding), state_of(6), placed))
    checkpoints.close()
    assert_is(restore(folder), 6)


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_step_that_is_not_newer_is_refused(folder, step):
    checkpoints = Checkpoints(folder)
    with pytest.raises(ValueError, match=f"checkpoints: step {step} is not newer than step 4, which is saved; go on"):
        checkpoints.save(step, state_of(step))
    assert_is(checkpoints.restore(LIKE), 4)
    checkpoints.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"matrix_DF": jnp.zeros((8, 17))},
            r"params/matrix_DF is float32\[8, 16\] there and float32\[8, 17\] in this run",
        ),
        ({"matrix_DF": jnp.zeros((16, 8))}, r"params/matrix_DF is float32\[8, 16\] there and float32\[16, 8\]"),
        ({"half": jnp.zeros(5)}, r"params/half is bfloat16\[5\] there and float32\[5\]"),
        ({"more": jnp.zeros(5)}, r"params/more is absent there and float32\[5\]"),
        ({"half": None}, r"params/half is bfloat16\[5\] there and absent"),
    ],
)
def test_another_shape_is_refused_by_the_arrays_name(folder, changes, words):
    with pytest.raises(InputError, match=rf"checkpoints/4: {words}.*set run_dir"):
        restore(folder, LIKE._replace(params=LIKE.params | changes))
    assert_is(restore(folder), 4)  # and nothing was thrown away
