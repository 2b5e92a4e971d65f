"""RAFT in JAX/Flax: a language model learns a domain without forgetting the rest.

RAFT (arXiv:2606.00147) refines a data set into answers that the model itself could have written, then trains on
them while distilling, on the model's own rollouts, from a frozen copy that sees the answer.
"""

__version__ = "0.1.0"
