"""What a rewriting may not do to a gold answer, on pairs of texts judged by hand."""

from __future__ import annotations

import pytest

from raft_jax.refine.facts import is_copy, mismatches, names, numbers

FAITHFUL = [
    ("Port tack. Rule 12.", "The boat on port tack must keep clear, under Rule 12.", "Who gives way?"),
    ("Yes.", "Yes, you may.", "May I stop?"),
    ("No.", "No, you may not.", "May I stop?"),
    ("No.", "You are not allowed to stop.", "May I stop?"),
    ("Two short blasts.", "She sounds 2 short blasts.", "What does she sound?"),
    ("Within thirty days.", "You must appeal within 30 days.", "When must I appeal?"),
    ("The fee is $1,000.", "You pay a fee of $1000.00.", "What does one pay?"),
    ("In 1990 the VA started the plan.", "The VA started the plan in 1990.", ""),
    ("If the light is red, stop.", "Stop if the light is red.", ""),
    ("1. Apply online.\n2. Print the form.", "- Apply online.\n- Print the form.", ""),
    ("Keep the form for 1 year.", "Keep the form for one year.", ""),
    ("Use 5 mg daily.", "You should use 5 milligrams daily.", ""),
    ("The vessel must not anchor in the channel.", "The vessel mustn't anchor in the channel.", ""),
    ("Call the VA's office.", "Call the office of the VA.", ""),
    ("It can't be sold.", "It cannot be sold.", ""),
    ("Nobody may enter.", "Nobody is allowed to enter.", ""),
    ("Paid and unpaid leave count.", "Unpaid leave counts, and so does paid leave.", ""),
    ("Bring a paper with your name (like a bill).", "Bring a paper with your name, such as a bill.", ""),
    ("One boat keeps clear of the other.", "One of the boats and the other boat: the first keeps clear.", ""),
]
UNFAITHFUL = [
    # numbers and units
    ("Appeal within 30 days.", "Appeal within 300 days.", "number 30"),
    ("Appeal within thirty days.", "Appeal within 40 days.", "number 30"),
    ("Appeal within 30 days.", "Appeal within 30 months.", "30 day became 30 month"),
    ("Take 10 mg daily.", "Take 10 g daily.", "10 mg became 10 g"),
    ("The limit is 1.5 l.", "The limit is 15 l.", "1.5"),
    ("A needs 3 days. B needs 5 days.", "A needs 5 days. B needs 3 days.", "3 became 5"),
    ("Rule 12 applies.", "The rule applies.", "number 12"),
    ("Pay the fee.", "Pay the fee of $50.", "number 50 is new"),
    # names, code, addresses
    ("Write to the IMO.", "Write to the UN.", "IMO"),
    ("See Alice about it.", "See Robert about it.", "Alice"),
    ("Open www.example.org/form to apply.", "Open the form to apply.", "example"),
    ("Use $name =~ s/a/b/ here.", "Use $name =~ s/a/c/ here.", "s/a/b/"),
    # one of two that differ by their form alone
    (
        "Guards on duty, whether an armed patrol or an unarmed patrol, may enter the old harbour at night.",
        "Guards on duty, whether an armed patrol or some patrol, may enter the old harbour at night.",
        "'unarmed' is missing",
    ),
    # made-up examples
    (
        "Bring a paper that shows your name.",
        "Bring a paper that shows your name, such as a passport.",
        "an example is new",
    ),
    (
        "Bring two papers (including a bill) to the office.",
        "Bring two papers (including a bill, such as a passport) to the office.",
        "an example is new",
    ),
    ("The grant pays for books and tools.", "The grant pays for books, tools, and other costs.", "'and other' is new"),
    # negations
    ("You may not enter the zone.", "You may enter the zone.", "negation is lost"),
    ("You may enter the zone.", "You may not enter the zone.", "negation is new"),
    ("You may never enter the zone.", "You may always enter the zone.", "negation is lost"),
    ("Enter without a permit.", "Enter with a permit.", "negation is lost"),
    ("A may enter. B may not enter.", "A may not enter. B may enter.", "negation"),
    ("Yes.", "No, you may not.", "'yes' became 'no'"),
    ("No. Rule 5.", "Yes, under Rule 5.", "'no' became 'yes'"),
    ("No.", "You are allowed to stop.", "'no' is lost"),
    ("Yes, so far as possible. Rule 18 binds her.", "Rule 18 binds her so far as possible.", "'yes' is lost"),
    ("It depends on the state.", "Yes, it depends on the state.", "'yes' is new"),
    # modal verbs and opposites
    ("You must apply online.", "You may apply online.", "obligation became a permission"),
    ("You may apply online.", "You have to apply online.", "permission became an obligation"),
    ("Both parents must sign.", "Neither parent must sign.", "'both' became 'neither'"),
    ("Adults must pay. Children may pay.", "Adults may pay. Children must pay.", "became"),
    ("Ships under 20 m give way.", "Ships over 20 m give way.", "'under' became 'over'"),
    ("At least 50 boats start.", "At most 50 boats start.", "'least' became 'most'"),
    ("Heat it before mixing.", "Heat it after mixing.", "'before' became 'after'"),
    ("The rate increases then.", "The rate decreases then.", "'increases' became 'decreases'"),
    ("This act is legal.", "This act is illegal.", "'legal' became 'illegal'"),
    ("The dose is harmless.", "The dose is harmful.", "'harmless' became 'harmful'"),
    ("The patient has hypertension.", "The patient has hypotension.", "became 'hypotension'"),
    # roles
    ("Windward keeps clear of leeward.", "Leeward keeps clear of leeward.", "'windward' became 'leeward'"),
    (
        "The windward boat keeps clear of the leeward boat.",
        "The leeward boat keeps clear of the windward boat.",
        "changed places",
    ),
    ("The seller pays the broker.", "The broker pays the seller.", "changed places"),
    ("Trains run from Paris to London.", "Trains run from London to Paris.", "changed places"),
    ("Iron is heavier than zinc but cheaper.", "Zinc is heavier than iron but cheaper.", "changed places"),
    # losses and additions
    (
        "Schizophrenia is one type of psychotic disorder. People with bipolar disorder may have psychotic symptoms, "
        "too. Other causes of psychosis are alcohol, brain tumours, and stroke. Treatment depends on the cause of "
        "psychosis.",
        "Schizophrenia is one type of psychotic disorder. Other causes of psychosis are alcohol, brain tumours, brain "
        "transplants, and stroke; people may have symptoms. Treatment depends on the cause of psychosis.",
        "bipolar",
    ),
    ("The loan covers tuition, housing and books.", "The loan covers tuition and housing.", "missing (books)"),
    (
        "Studies looked at the effects of hunger, thirst, cold, and isolation on crews of ships and of trains.",
        "Studies looked at the effects of hunger, cold, and isolation on crews of ships and of trains.",
        "'thirst' is missing from a list",
    ),
    (
        "You may train for a trade that the school offers, like:\n- Plumbing\n- Firefighting",
        "You may train for a trade that the school offers, like:\n- Plumbing\n- Firefighting\n- Healthcare",
        "the item 'Healthcare' is new",
    ),
    (
        "If the injury was caused, or made worse, by service, apply.",
        "If the injury was caused by service, apply.",
        "missing (worse)",
    ),
    (
        "Report the theft to the police. Then call your insurance company within a week.",
        "Report the theft to the police.",
        "are missing",
    ),
    (
        "Store the vaccine in the fridge between meals and keep it dry.",
        "Store the vaccine in the fridge between meals and keep it dry. Doctors recommend regular exercise and plenty "
        "of fruit for healthy adults.",
        "is new",
    ),
]


@pytest.mark.parametrize(("gold", "text", "question"), FAITHFUL)
def test_a_faithful_text_has_no_mismatches(gold, text, question):
    assert mismatches(gold, text, question) == []


@pytest.mark.parametrize(("gold", "text", "named"), UNFAITHFUL)
def test_a_wrong_text_is_named(gold, text, named):
    found = mismatches(gold, text)
    assert any(named in mismatch for mismatch in found), found


@pytest.mark.parametrize("gold", sorted({gold for gold, *_ in [*FAITHFUL, *UNFAITHFUL]}))
def test_a_text_agrees_with_itself(gold):
    assert mismatches(gold, gold) == []


def test_a_long_text_of_like_sentences_agrees_with_itself():
    text = " ".join(f"Boat {number} meets boat {number % 7} at buoy {number % 5}." for number in range(300))
    assert mismatches(text, text) == []
    assert mismatches(text, text.replace("Boat 8 meets", "Boat 9 meets")) == ["the number 8 is missing"]


def test_a_text_may_take_numbers_and_names_from_the_question():
    gold, text = "Ninety days after discharge.", "Under Form 22 of the VA, it is 90 days after discharge."
    assert mismatches(gold, text, "By when does the VA want Form 22?") == []
    assert any("22" in found for found in mismatches(gold, text))


def test_word_recall_is_a_setting():
    gold = "The committee reviews every request and informs the applicant about its decision."
    text = "The committee reviews every request and tells the person about its decision."
    assert mismatches(gold, text, word_recall=0.7) == []
    assert any("content words are missing" in found for found in mismatches(gold, text, word_recall=0.9))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("twenty-five", {"25"}),
        ("two hundred and ten", {"210"}),
        ("1,000 and 2.50", {"1000", "2.5"}),
        ("three million", {"3000000"}),
        ("one of them", set()),
        ("May 5, 2018", {"5", "2018"}),
        ("at 07:30", {"07:30"}),
        ("the third", {"3"}),
        ("", set()),
    ],
)
def test_numbers(text, expected):
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rule 13 binds all, says the IMO to Alice.", {"IMO", "Alice"}),
        ("Go there. Then go back. I'm sure.", set()),
        ("(See the Navy’s page)", {"Navy"}),
        ("- First item\n- Second", set()),
    ],
)
def test_names(text, expected):
    assert set(names(text).values()) == expected


def test_a_copy_is_told_from_a_rewriting():
    assert is_copy("No. Rule 12.", " no, rule 12 ") and is_copy("It’s so.", "It's so!")
    assert not is_copy("No. Rule 12.", "No. Rule 13.") and not is_copy("No. Rule 12.", "Rule 12. No.")
