"""Compilation for tests of what a program computes, not of how LLVM lays out its loops."""

import functools
import importlib

import jax
from jaxlib import version

# In jax 0.7 the one, from 0.8 on the other.
enable_x64 = (jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")).enable_x64

# The older code for fused loops compiles three times as fast, and a small program faster in one piece; jaxlib 0.11 has
# the first no more, nor the option.
PLAIN_LOOPS = (
    {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    if version.__version_info__ < (0, 11)
    else {}
)
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# The same program of XLA's, its loops as LLVM finds them: a fraction of the time of compiling, which is most of these
# tests' time. conftest.py does so for all of them; this is for a program that has to be quick in any case.
quick_jit = functools.partial(jax.jit, compiler_options=UNOPTIMISED | PLAIN_LOOPS)
# What hangs on the loops themselves (bits, zeros) is compiled as for use.
AS_USED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False} | (
    {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32} if PLAIN_LOOPS else {}
)
used_jit = functools.partial(jax.jit, compiler_options=AS_USED)


def xla_flags(options):
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())


def as_one(function, *arrays, **settings):
    """function(*arrays, **settings) as one program, not op by op: those are a hundred, and take longer to compile."""
    return quick_jit(functools.partial(function, **settings))(*arrays)
