"""Builds `tokenizer.model`, sentencepiece's own vocabulary file, from the fields of a GGUF file.

llama.cpp's converter reads such vocabularies only from that file. The format is Protocol Buffers; the numbers below
are the field numbers of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # of ModelProto
PIECE, SCORE, KIND = 1, 2, 3  # of SentencePiece; GGUF has the same numbers for kinds
MODEL_TYPE, VOCAB_SIZE, BYTE_FALLBACK, SPECIAL = 3, 4, 35, {"unknown": 40, "bos": 41, "eos": 42, "padding": 43}
BPE, UNKNOWN, UNUSED = 2, 2, 5
NAME, DUMMY_PREFIX, REMOVE_EXTRA, ESCAPE = 1, 3, 4, 5  # of NormalizerSpec
NO_TOKEN = -1


def model_file(metadata: Mapping[str, Any]) -> bytes:
    """The bytes of `tokenizer.model`; a missing field is a KeyError that names it."""
    tokens, scores, kinds = (metadata[f"tokenizer.ggml.{field}"] for field in ("tokens", "scores", "token_type"))
    ids = {name: int(metadata.get(f"tokenizer.ggml.{name}_token_id", NO_TOKEN)) for name in SPECIAL}
    ids["unknown"] = max(ids["unknown"], 0)

    def kind_of(index: int) -> int:
        """sentencepiece allows one unknown token; GGUF files also mark their padding as unknown."""
        if index == ids["unknown"]:
            return UNKNOWN
        return UNUSED if kinds[index] == UNKNOWN else int(kinds[index])

    pieces = b"".join(
        _bytes(PIECES, _bytes(PIECE, token.encode()) + _float(SCORE, score) + _integer(KIND, kind_of(index)))
        for index, (token, score) in enumerate(zip(tokens, scores, strict=True))
    )
    trainer = _integer(MODEL_TYPE, BPE) + _integer(VOCAB_SIZE, len(tokens)) + _integer(BYTE_FALLBACK, 1)
    trainer += b"".join(_integer(field, ids[name]) for name, field in SPECIAL.items())
    prefix = int(bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    normalizer = _bytes(NAME, b"identity") + _integer(DUMMY_PREFIX, prefix) + _integer(REMOVE_EXTRA, 0)
    normalizer += _integer(ESCAPE, 1)
    return pieces + _bytes(TRAINER, trainer) + _bytes(NORMALIZER, normalizer)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers as 64-bit two's complement
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes([*groups, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
