"""RAFT in JAX/Flax: a language model learns a domain without forgetting the rest.

RAFT (arXiv:2606.00147) refines the answers of a data set into ones that the model itself could have written. It then
trains on them and, on the model's own rollouts, distils from a frozen copy that sees the answer.
"""

__version__ = "0.1.0"
