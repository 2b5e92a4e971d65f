"""Compiled programs of jitted functions, kept by the shapes of their arguments: made ahead, or at the first call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax

AT_ONCE = 8  # programs that are compiled at the same time, at most


class CompiledFunction:
    """A jitted function with a program for each structure, shape and dtype of its arguments.

    Shardings have to be the same in all calls.

    Example:
      >>> import jax.numpy as jnp
      >>> double = CompiledFunction(jax.jit(lambda x: 2 * x))
      >>> compile_ahead([(double, (jax.ShapeDtypeStruct((2,), jnp.int32),))])
      >>> double(jnp.array([1, 2])).tolist(), len(double.programs)
      ([2, 4], 1)
    """

    def __init__(self, function: Callable[..., Any]):
        """`function` is the result of `jax.jit`."""
        self._function = function
        self._programs: dict[Any, Any] = {}
        self.called: dict[Any, Any] = {}  # the programs that ran, for who clears it

    def __call__(self, *arguments):
        key = _key(arguments)
        if key not in self._programs:
            self._programs[key] = self._function.lower(*arguments).compile()
        self.called[key] = self._programs[key]
        return self._programs[key](*arguments)

    @property
    def programs(self) -> list[Any]:
        """The programs that are compiled (jax.stages.Compiled)."""
        return list(self._programs.values())

    def program(self, *arguments) -> Any | None:
        """The program for arguments, which may be `jax.ShapeDtypeStruct`; None if it is not compiled."""
        return self._programs.get(_key(arguments))

    def lower(self, *arguments) -> Any:
        """The function's program for arguments, which may be `jax.ShapeDtypeStruct`, before it is compiled."""
        return self._function.lower(*arguments)

    def compiling(self, *arguments) -> Callable[[], None]:
        """Traces the function, and returns a function that compiles its program, in any thread."""
        key, lowered = _key(arguments), self._function.lower(*arguments)

        def compile_it() -> None:
            self._programs[key] = lowered.compile()

        return compile_it


def _key(arguments: Any) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def compile_ahead(
    needed: Sequence[tuple[CompiledFunction, tuple]], on_program: Callable[[], None] = lambda: None
) -> None:
    """Compiles the programs of functions for arguments, several at once; calls `on_program` after each."""
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        try:
            tasks = [pool.submit(function.compiling(*arguments)) for function, arguments in needed]
            for task in as_completed(tasks):
                task.result()
                on_program()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
