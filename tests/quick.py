"""Compilation for tests of what a program computes, not of how LLVM lays out its loops."""

import functools
import importlib

import jax
from jaxlib import version

# In jax 0.7 the one, from 0.8 on the other.
enable_x64 = (jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")).enable_x64

# The older code for fused loops compiles three times as fast; jaxlib 0.11 has it no more, nor the option.
OLD_FUSIONS = {"xla_cpu_use_fusion_emitters": False} if version.__version_info__ < (0, 11) else {}
# The same program of XLA's, its loops as LLVM finds them: a fraction of the time of compiling, which is most of these
# tests' time. What hangs on the loops themselves (bits, zeros, memory) is compiled as for use.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True} | OLD_FUSIONS,
)


def as_one(function, *arrays, **settings):
    """function(*arrays, **settings) as one program, not op by op: those are a hundred, and take longer to compile."""
    return quick_jit(functools.partial(function, **settings))(*arrays)
