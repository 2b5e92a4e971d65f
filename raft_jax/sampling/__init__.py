"""Sampling: one engine for rewriting, rollouts and evaluation, and the likelihood of given answers."""

from raft_jax.sampling.decode import make_generate, sample_token
from raft_jax.sampling.engine import Completion, Sampler
from raft_jax.sampling.score import Scorer, answer_hidden, answer_means

__all__ = [
    "Completion",
    "Sampler",
    "Scorer",
    "answer_hidden",
    "answer_means",
    "make_generate",
    "sample_token",
]
