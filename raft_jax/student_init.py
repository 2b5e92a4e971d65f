"""Another tuned copy of the base model as the student's start, for example one that has forgotten and is repaired."""

from __future__ import annotations

from dataclasses import asdict

from raft_jax.errors import InputError
from raft_jax.models.config import DecoderConfig
from raft_jax.models.tokenizer import CUT_IN_MANY_WAYS, Tokenizer, tokenizer_of
from raft_jax.models.weights import check_keys, config_as_loaded, config_of, open_weights
from raft_jax.sources import resolve

KEY = "train.student_init"
# Fields of a DecoderConfig that say how it is computed here, not what.
OF_THIS_RUN = ("vocab_padding", "adapter_scale", "kernel", "remat")


def require_student_init(source: str | None, decoder: DecoderConfig, tokenizer: Tokenizer) -> None:
    """Raises InputError unless there is a model at the source that could have been tuned from the base model.

    Args:
      source: the setting `train.student_init`; None is always right.
      decoder: the base model's config. All that determines shapes and arithmetic must be equal.
      tokenizer: the base model's. The vocabularies must be equal, and split texts alike. Prompts follow the chat
        template of the base model.
    """
    if source is None:
        return
    try:
        weights = open_weights(resolve(source))
        check_keys(weights, config_of(weights))
        config = config_as_loaded(weights)
        other = tokenizer_of(weights, config.vocab_size)
    except InputError as error:
        raise InputError(f"{KEY}: {error}") from error
    ours, theirs = asdict(decoder), asdict(config)
    for name, value in ours.items():
        if name not in OF_THIS_RUN and theirs[name] != value:
            raise InputError(
                f"{KEY}: {source} has {name} {theirs[name]}, and model.source has {value}; "
                "it must be a model that was tuned from model.source"
            )
    same = other.backend.get_vocab() == tokenizer.backend.get_vocab() and other.stop_ids == tokenizer.stop_ids
    if not same or other.encode(CUT_IN_MANY_WAYS) != tokenizer.encode(CUT_IN_MANY_WAYS):
        raise InputError(
            f"{KEY}: the tokenizer of {source} is not that of model.source; "
            "it must be a model that was tuned from model.source"
        )
