"""The persistent cache of compiled programs: where it is, and what is refused."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from raft_jax.compile_cache import use_compile_cache
from raft_jax.errors import InputError


@pytest.fixture(autouse=True)
def no_cache():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_none_on_the_cpu_and_none_where_it_is_off(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for backend, setting in (("cpu", "auto"), ("tpu", "off")):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert use_compile_cache(setting) is None
    assert jax.config.jax_compilation_cache_dir is None and not any(tmp_path.iterdir())


def test_the_users_own_folder_on_a_tpu(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    folder = use_compile_cache("auto")
    assert folder == tmp_path / "raft_jax/programs" and jax.config.jax_compilation_cache_dir == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_jax_was_given_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    assert use_compile_cache(str(tmp_path / "other")) == tmp_path / "given"
    assert not (tmp_path / "other").exists()


def test_folders_that_are_refused(tmp_path):
    shared, file = tmp_path / "shared", tmp_path / "file"
    shared.mkdir()
    shared.chmod(0o770)
    file.write_text("")
    with pytest.raises(InputError, match=r"^compilation_cache: .*shared is not yours alone .*`chmod go-w"):
        use_compile_cache(str(shared))
    with pytest.raises(InputError, match=r"^compilation_cache: .*file.*; set it to another folder or to off"):
        use_compile_cache(str(file))


def test_a_second_process_finds_the_programs(tmp_path):
    """Counted by the files of the cache: the first process writes them, the second writes none and says it has read."""
    program = (
        "import sys, jax, jax.numpy as jnp\n"
        "from raft_jax.compile_cache import use_compile_cache\n"
        "use_compile_cache(sys.argv[1])\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith('/cache_hits')))\n"
        "print(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((3, 4))).shape, sum(hits))\n"
    )

    def run() -> str:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [sys.executable, "-c", program, str(tmp_path / "cache")]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    first, second = run(), run()
    assert first.split()[-1] == "0" and int(second.split()[-1]) >= 1
