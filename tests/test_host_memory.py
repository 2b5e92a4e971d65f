"""Memory that compilations leave behind, on any C library."""

import ctypes
from types import SimpleNamespace

import jax
import pytest

from raft_jax.host_memory import return_memory_after_compiling


@pytest.fixture
def fresh(monkeypatch):
    """Neither listeners from before nor any left behind."""
    listeners, register = [], jax.monitoring.register_event_duration_secs_listener
    monkeypatch.setattr(
        jax.monitoring,
        "register_event_duration_secs_listener",
        lambda listener: (listeners.append(listener), register(listener)),
    )
    return_memory_after_compiling.cache_clear()
    yield
    return_memory_after_compiling.cache_clear()
    for listener in listeners:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_a_long_compilation_is_followed_by_a_trim(fresh, monkeypatch):
    trims = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=trims.append))
    return_memory_after_compiling(0.0)
    return_memory_after_compiling(0.0)
    jax.jit(lambda x: x * 3 + 1)(2.0)
    assert trims == [0]


def test_a_short_one_is_not_and_other_libraries_have_no_trim(fresh, monkeypatch):
    trims = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=trims.append))
    return_memory_after_compiling(1e6)
    jax.jit(lambda x: x * 3 + 2)(2.0)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    return_memory_after_compiling(0.5)
    assert not trims
