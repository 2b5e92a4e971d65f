"""Compilation for tests of what a program computes, not of how LLVM lays out its loops."""

import functools

import jax

# The same program of XLA's, its loops as LLVM finds them: half the time of compiling, which is most of the time of
# these tests. What hangs on the loops themselves (bits, zeros, memory) is compiled as for use.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def as_one(function, *arrays, **settings):
    """function(*arrays, **settings) as one program, not op by op: those are a hundred, and take longer to compile."""
    return quick_jit(functools.partial(function, **settings))(*arrays)
