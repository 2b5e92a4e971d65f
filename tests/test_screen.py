"""Which written texts cannot be used: prompts that come back, lead-ins, loops."""

from __future__ import annotations

import pytest

from raft_jax.data.prompts import fusion_prompt, rewrite_prompt
from raft_jax.refine.screen import repeated_instructions, repetition, without_lead_in

SOURCE = "How long may I keep the text of a complete statement?\nThirty days. Keep clear of the first name."


def instructions(*conversations):
    return "\n".join(message["content"] for conversation in conversations for message in conversation)


PROMPTS = instructions(rewrite_prompt("", "?"), fusion_prompt("", "", "?"))


@pytest.mark.parametrize(
    "text",
    [
        "Merge the two texts into one, in clear, complete sentences.",
        "Thirty days. Keep every fact, number and name of it.",
        "Text 1: Thirty days. Text 2: A month.",
        "Rewrite the following: Thirty days.",
        "The rewritten statement is: thirty days.",
        "This text answers the question about days.",
        "Here, the user asks for thirty days.",
        "user: Thirty days.",
        "Thirty days.<|im_end|>",
        "[INST] Thirty days. [/INST]",
        "It takes thirty days, paraphrased.",
    ],
)
def test_a_text_that_speaks_of_its_task_is_found(text):
    assert repeated_instructions(text, PROMPTS, SOURCE)


@pytest.mark.parametrize(
    "text",
    [
        "You may keep the text of a complete statement for thirty days.",
        "Thirty days; keep clear of the first name.",
        "Every name and every number counts.",
        "",
    ],
)
def test_a_text_may_say_what_its_sources_say(text):
    assert repeated_instructions(text, PROMPTS, SOURCE) is None


@pytest.mark.parametrize(
    "gold",
    [
        "Merge the two texts into one, in clear, complete sentences.",
        "Rewrite the text.",
        "Text 1: see below.",
    ],
)
def test_a_gold_answer_about_writing_may_be_written(gold):
    assert repeated_instructions(gold, PROMPTS, f"What did they ask?\n{gold}") is None


@pytest.mark.parametrize("prompt", [rewrite_prompt("", "?"), fusion_prompt("", "", "?")])
def test_every_four_words_of_the_prompts_are_found(prompt):
    """Runs with more than one word of meaning, whatever the wording of the prompts."""
    words = instructions(prompt).replace("\n", " ").split()
    missed = [
        run
        for run in (" ".join(words[start : start + 5]) for start in range(len(words) - 4))
        if not repeated_instructions(f"Thirty days. {run}", instructions(prompt), SOURCE)
    ]
    assert len(missed) <= len(words) // 6, missed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Here is the rewritten text:\n\nThirty days.", "Thirty days."),
        ("Here's a clearer version of the text: Thirty days.", "Thirty days."),
        ('Sure! Here is the merged text: "Thirty days."', "Thirty days."),
        ("Rewritten text: Thirty days.", "Thirty days."),
        ("Answer: Thirty days.", "Thirty days."),
        ("The correct answer is: Thirty days.", "Thirty days."),
        ("The answer to this question is:\n\nThirty days.", "Thirty days."),
        ("“Thirty days.”", "“Thirty days.”"),
        ("Here is what you need: a form.", "Here is what you need: a form."),
        ("Sure-footed animals climb: goats.", "Sure-footed animals climb: goats."),
        ("The following documents are needed: a form.", "The following documents are needed: a form."),
        ("Here is the text:", "Here is the text:"),
        ("", ""),
    ],
)
def test_lead_ins(text, expected):
    assert without_lead_in(text) == expected


def test_loops_are_found_and_lists_are_not():
    gold = "Call the office. Bring a form.\n- Books and supplies\n- Tuition"
    assert repetition(gold, gold) is None
    assert repetition("Call the office. Bring a form. Call the office.", gold) == "Call the office."
    assert repetition("- Books and supplies\n" * 3, gold) == "- Books and supplies"
    assert repetition("Yes. Yes. Call the office.", gold) is None
    assert repetition("Call the office. Call your office.", gold) == "Call your office."
    assert repetition("- Tuition\n- Books and supplies\n- Tuition", gold) == "- Tuition"
    # The first name is the second's: what should stand there is lost.
    named = "The guest pass replaces neither the crew pass of the harbour nor a visa."
    twice = "The crew pass of the harbour or a visa does not replace the crew pass of the harbour or a visa."
    assert repetition(twice, named) == "the crew pass of the harbour"
    run = "the boat that keeps clear of it, "
    assert repetition("It is " + run * 4, gold)
    assert repetition(f"{gold} {gold}", f"{gold} {gold}") is None
