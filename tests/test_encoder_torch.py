"""The sentence encoder against transformers on torch, live: the real MiniLM, and random models of every family."""

import runpy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoTokenizer, BertConfig, MPNetConfig, RobertaConfig, XLMRobertaConfig  # noqa: E402
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder  # noqa: E402

from raft_jax.models.encoder import load_encoder, relative_buckets  # noqa: E402
from raft_jax.sources import resolve  # noqa: E402

maker = runpy.run_path(str(Path(__file__).parent / "fixtures" / "make_encoder_fixture.py"))
TEXTS = maker["TEXTS"]
CONFIGS = {"bert": BertConfig, "mpnet": MPNetConfig, "roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig}
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


def test_minilm():
    folder = resolve(maker["MINILM"])
    expected = maker["reference"](folder, TEXTS, 256, "mean", True)
    np.testing.assert_allclose(load_encoder(maker["MINILM"]).encode(TEXTS), expected, atol=1e-4)
    np.testing.assert_allclose(np.load(Path(__file__).parent / "fixtures/encoder/minilm.npy"), expected, atol=1e-5)


def test_minilm_tokens():
    encoder = load_encoder(maker["MINILM"])
    theirs = AutoTokenizer.from_pretrained(resolve(maker["MINILM"]))
    texts = [*TEXTS, "[CLS] a [SEP] b [MASK][PAD]", "[unused1] ##s"]
    expected = theirs(texts, truncation=True, max_length=256, split_special_tokens=True)["input_ids"]
    assert encoder._tokenize(texts) == expected


@pytest.mark.parametrize(
    ("family", "pooling", "normalize", "activation", "prefix", "seed"),
    [
        ("bert", "mean", False, "gelu", "", 1),
        ("bert", "max", True, "relu", "query: ", 2),
        ("mpnet", "mean", True, "gelu", "", 3),
        ("mpnet", "cls", False, "gelu_new", "passage: ", 4),
        ("roberta", "mean", True, "gelu_pytorch_tanh", "", 5),
        ("xlm-roberta", "cls", True, "gelu", "query: ", 6),
    ],
)
def test_random_models(tmp_path, family, pooling, normalize, activation, prefix, seed):
    special = "mpnet" if family != "bert" else "bert"  # RoBERTa's padding has the id 1, like MPNet's
    num_tokens = maker["save_tokenizer"](tmp_path, special)
    config = CONFIGS[family](
        vocab_size=num_tokens, max_position_embeddings=252, hidden_act=activation, layer_norm_eps=1e-5, **SIZES
    )
    maker["save_model"](tmp_path, config, seed)
    maker["save_sentence_transformer"](tmp_path, 250, pooling, normalize)
    encoder = load_encoder(tmp_path, prefix=prefix)
    expected = maker["reference"](tmp_path, TEXTS, 250, pooling, normalize, prefix)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)
    assert encoder.num_truncated == 2
    assert encoder.config.family == family


def test_concatenated_poolings(tmp_path):
    num_tokens = maker["save_tokenizer"](tmp_path, "bert")
    maker["save_model"](tmp_path, BertConfig(vocab_size=num_tokens, **SIZES), 0)
    maker["save_sentence_transformer"](tmp_path, 64, "mean", False)
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": ["max", "cls"]}')
    parts = [maker["reference"](tmp_path, TEXTS, 64, pooling, False) for pooling in ("max", "cls")]
    np.testing.assert_allclose(load_encoder(tmp_path).encode(TEXTS), np.concatenate(parts, axis=1), atol=1e-5)


def test_relative_buckets_are_those_of_transformers():
    steps = torch.arange(600)
    expected = MPNetEncoder.relative_position_bucket(steps[None, :] - steps[:, None])
    np.testing.assert_array_equal(relative_buckets(600), expected.numpy())
