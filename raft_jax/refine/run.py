"""Stage 1: makes the fused data set from questions and gold answers, recording every step (Eqs. 1-4, App. C-D)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from raft_jax.config import RefineConfig
from raft_jax.data.examples import Example
from raft_jax.data.refined import STATUSES, RefinedRow, Round, Status
from raft_jax.models.encoder import Encoder, similarities
from raft_jax.progress import progress
from raft_jax.refine.chat import FAILED, REFUSED
from raft_jax.refine.facts import is_copy, mismatches
from raft_jax.refine.generate import SECOND_TRY, Generator, LongerGenerator, RefineItem, digest
from raft_jax.refine.judge import Judge
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.pace import Pace
from raft_jax.refine.scoring import Scored, scores_of
from raft_jax.refine.screen import repeated_instructions, repetition, without_lead_in

NAMED_MISMATCHES = 3


class RefineModels(NamedTuple):
    """The models of the refinement; each is an interface, so any of them can be a remote model.

    `renders` tells whether a text can be trained on as the answer to an item: a chat template may refuse or change it.
    `fits` tells whether it has at most so many times refine.max_new_tokens, where another model than the one that is
    trained may have written it. `has_room` tells whether the models take a rewriting of the length of a second try.
    """

    rewriter: Generator
    encoder: Encoder
    fuser: Generator
    judges: Sequence[Judge]
    renders: Callable[[RefineItem, str], bool] = lambda item, text: True
    fits: Callable[[str, int], bool] = lambda text, times: True
    has_room: Callable[[RefineItem], bool] = lambda item: True


class Text(NamedTuple):
    """A generated text after screening, its status, and a note on the problem if it is not "ok"."""

    text: str
    status: Status
    note: str = ""


def refine(
    examples: Sequence[Example], models: RefineModels, settings: RefineConfig, ledger: Ledger
) -> list[RefinedRow]:
    """Rewrites, filters, fuses and judges; results that are in the ledger are reused.

    A record is reused only if everything that it depends on (texts, prompts, settings, models) is the same. Records of
    other data or other settings stay in the ledger and are not used. Where a model gives no reply, the row says so, and
    the ledger counts it in `num_failures`; the next call asks again.

    Returns:
      One row per example, in the same order, each with its full history.
    """
    items = [item_of(example) for example in examples]
    rewrites = _generate(models, models.rewriter, items, 1, "rewrite", "rewrite", settings, ledger)
    items = [replace(item, rewrite=written.text) for item, written in zip(items, rewrites, strict=True)]
    compared = [index for index, written in enumerate(rewrites) if written.status in ("ok", "facts", "copy")]
    similarity = dict(
        zip(
            compared, _similarities(models.encoder, [items[index] for index in compared], settings, ledger), strict=True
        )
    )
    for index in compared:
        if similarity[index] is None:
            rewrites[index] = rewrites[index]._replace(
                status="unknown", note="most of it is unknown to the sentence encoder"
            )
    accepted = [index for index in compared if _is_accepted(rewrites[index], similarity[index], settings)]
    gold = {index: items[index].gold for index in accepted}
    judges = [judge for judge in models.judges if getattr(judge, "scores_gold", True)]
    scored = scores_of(judges, items, gold, "gold answers", ledger)
    gold_scores = {index: judgements.scores for index, judgements in scored.items()}
    rounds: dict[int, list[Round]] = {index: [] for index in range(len(items))}
    active = accepted
    for number in range(1, settings.rounds + 1):
        if not active:
            break
        chosen = [items[index] for index in active]
        for index, result in zip(active, _round(models, chosen, number, settings, ledger), strict=True):
            rounds[index].append(result)
        active = [index for index in active if not _ends_rounds(rounds[index][-1], gold_scores[index], settings)]
    return [
        _decide(item, written, similarity.get(index), rounds[index], gold_scores.get(index, {}), settings)
        for index, (item, written) in enumerate(zip(items, rewrites, strict=True))
    ]


def item_of(example: Example) -> RefineItem:
    """A row before the refinement."""
    return RefineItem(example.id, example.question, example.answer, context=example.context, turns=example.turns)


def summary(rows: Sequence[RefinedRow]) -> Iterator[str]:
    """Lines with the number of rows and candidates of each outcome."""
    fused = sum(row.chosen == "fusion" for row in rows)
    yield f"refined {len(rows)} rows: {fused} have a fused answer, {len(rows) - fused} keep the gold one"
    accepted = sum(row.accepted for row in rows)
    counts = Counter(STATUSES[row.rewrite_status] for row in rows if not row.accepted)
    counts["below the similarity threshold"] = counts.pop(STATUSES["ok"], 0)
    yield f"  rewritings: {accepted} accepted{_listed(counts)}"
    candidates = [candidate for row in rows for candidate in row.rounds]
    if candidates:
        counts = Counter(STATUSES[candidate.status] for candidate in candidates)
        usable = counts.pop(STATUSES["ok"], 0)
        counts["judged worse than the gold answer or below refine.accept_floor"] = usable - fused
        yield f"  fused candidates: {len(candidates)}, of which {fused} chosen{_listed(counts)}"
    if unknown := sum(row.rewrite_status == "unknown" for row in rows):
        yield (
            f"  {unknown} of {len(rows)} rows are in a language that the sentence encoder does not know; set "
            "encoder.source to a multilingual one, such as hf://intfloat/multilingual-e5-small"
        )


def _listed(counts: Mapping[str, int]) -> str:
    return "".join(f", {count} × {name}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]) if count)


def text_key(generator: Generator, item: RefineItem, round: int) -> str:
    """The key of a rewriting's or a fusion's record: id, round, and a hash of everything that the text depends on."""
    return f"{item.id}#{round}#{digest(generator.identity, generator.prompt(item))}"


def _generate(
    models: RefineModels,
    generator: Generator,
    items: Sequence[RefineItem],
    round: int,
    stage: str,
    title: str,
    settings: RefineConfig,
    ledger: Ledger,
) -> list[Text]:
    """One text per item, from the ledger or from the generator; rewritings that are cut get a second try."""
    keys = [text_key(generator, item, round) for item in items]
    known = {record["key"].rpartition("#")[0] for record in ledger.records() if record["stage"] == stage}
    if changed := sum((stage, key) not in ledger and key.rpartition("#")[0] in known for key in keys):
        print(
            f"{title}: {changed} of {len(items)} rows anew, as their text, the prompt, the settings or the model "
            "changed",
            flush=True,
        )
    _write(generator, items, keys, round, stage, title, ledger)
    second = second_try(generator) if stage == "rewrite" else None
    if second and (cut := [item for item, key in zip(items, keys, strict=True) if _is_cut(ledger.get(stage, key))]):
        cut = list(filter(models.has_room, cut))
        again = [text_key(second, item, round) for item in cut]
        _write(second, cut, again, round, stage, f"{title}, second try", ledger, number=2)
        finished = sum((stage, key) in ledger and not _is_cut(ledger.get(stage, key)) for key in again)
        print(f"{title}: {len(cut)} cut at the limit, {finished} of them finished within twice the limit", flush=True)
    instructions = instructions_of(generator)
    return [_text_of(models, generator, second, item, round, stage, instructions, settings, ledger) for item in items]


def second_try(generator: Generator) -> Generator | None:
    """The generator of a second try at texts that are cut; None if there is none."""
    return generator.longer() if isinstance(generator, LongerGenerator) else None


def key_of_second_try(second: Generator | None, item: RefineItem, round: int, record: dict) -> str:
    """The key of the second try at a text whose first try is `record`; "" if there is none to be made."""
    return text_key(second, item, round) if second and _is_cut(record) else ""


def _is_cut(record: dict | None) -> bool:
    return record is not None and record["status"] == "truncated"


def _text_of(
    models: RefineModels,
    generator: Generator,
    second: Generator | None,
    item: RefineItem,
    round: int,
    stage: str,
    instructions: str,
    settings: RefineConfig,
    ledger: Ledger,
) -> Text:
    """The text of the last try at an item that came to something, screened."""
    key = text_key(generator, item, round)
    if (stage, key) not in ledger:
        return Text("", "failed", ledger.failure(stage, key))
    record = ledger[stage, key]
    if again := key_of_second_try(second, item, round, record):
        if (stage, again) not in ledger:
            return Text(record["text"], "truncated", ledger.failure(stage, again))
        record = ledger[stage, again]
    return usable(models, record, item, instructions, settings, longer=stage == "rewrite")


def _write(
    generator: Generator,
    items: Sequence[RefineItem],
    keys: Sequence[str],
    round: int,
    stage: str,
    title: str,
    ledger: Ledger,
    number: int = 1,
) -> None:
    """Records one text per item, but for those that the ledger has; `number` says which try this is."""
    done = {index for index, key in enumerate(keys) if (stage, key) in ledger}
    marked = {"try": number} if number > 1 else {}
    pace = Pace(getattr(generator, "chat", None), len(items) - len(done))
    with progress(title, len(items), "rows", len(done)) as bar:
        for generations in generator.generate(items, round, done):
            fresh = {index: generation for index, generation in generations.items() if index not in done}
            for index, generation in fresh.items():
                # A server that does not take so long a limit will not take it when it is asked again.
                refused = number > 1 and generation.record.get("finish") == REFUSED
                if generation.status == FAILED and not refused:
                    ledger.fail(stage, keys[index], generation.note)
            ledger.append(
                [
                    {
                        "stage": stage,
                        "key": keys[index],
                        "text": generation.text,
                        "status": generation.status,
                        "num_tokens": generation.num_tokens,
                        **marked,
                        **generation.record,
                    }
                    for index, generation in fresh.items()
                    if generation.status != FAILED
                ]
            )
            bar.advance(len(fresh), pace.note(len(fresh), sum(generation.num_tokens for generation in fresh.values())))


def instructions_of(generator: Generator) -> str:
    """The prompt of a generator without any row's own texts."""
    return "\n".join(message["content"] for message in generator.prompt(RefineItem("", "", "")))


def usable(
    models: RefineModels, record: dict, item: RefineItem, instructions: str, settings: RefineConfig, longer: bool
) -> Text:
    """A recorded text, screened by its words, by its length and by the chat template.

    With `longer` it may have the length of a second try, where the models have room for it.
    """
    text = screened(record, item, instructions, settings)
    if text.status == "ok" and not models.renders(item, text.text):
        return text._replace(status="unrenderable", note="the model's chat template refuses or changes it")
    longer = longer and not models.fits(text.text, 1) and models.has_room(item)
    if text.status == "ok" and not models.fits(text.text, SECOND_TRY if longer else 1):
        return text._replace(status="truncated", note="longer than refine.max_new_tokens")
    return text


def screened(generation: dict, item: RefineItem, instructions: str, settings: RefineConfig) -> Text:
    """Screens a generated text by its words, before its meaning is compared with embeddings."""
    if generation["status"] != "ok":
        return Text(generation["text"], generation["status"])
    text = without_lead_in(generation["text"])
    if passage := repeated_instructions(text, instructions, f"{item.source}\n{item.gold}"):
        return Text(text, "leak", f"it repeats its instructions: {passage!r}")
    if is_copy(item.gold, text):
        return Text(text, "copy")
    if passage := repetition(text, item.gold):
        return Text(text, "repetition", f"it repeats {passage[:80]!r}")
    if settings.check_facts and (differences := mismatches(item.gold, text, item.source, settings.word_recall)):
        more = f"; and {len(differences) - NAMED_MISMATCHES} more" if len(differences) > NAMED_MISMATCHES else ""
        return Text(text, "facts", "; ".join(differences[:NAMED_MISMATCHES]) + more)
    return Text(text, "ok")


def _similarities(
    encoder: Encoder, items: Sequence[RefineItem], settings: RefineConfig, ledger: Ledger
) -> list[float | None]:
    """Eq. 2 for each item; None if most of either text is unknown to the encoder.

    The embedding of a terse answer ("Yes.") says little about its meaning, so the question is put before such
    an answer and before its rewriting.
    """

    def read(item: RefineItem, text: str) -> str:
        question, *_ = item.asked(settings.terse_words)
        return f"{question}\n{text}" if question else text

    pairs = [(read(item, item.gold), read(item, item.rewrite)) for item in items]
    keys = [f"{item.id}#{digest(encoder.identity, *pair)}" for item, pair in zip(items, pairs, strict=True)]
    if any(("similarity", key) not in ledger for key in keys):
        with progress("similarity", 2 * len(items), "texts") as bar:
            gold, rewrites = zip(*pairs, strict=True)
            values = similarities(encoder, gold, rewrites, bar.advance)
        ledger.append(
            [
                {"stage": "similarity", "key": key, "value": None if math.isnan(value) else round(float(value), 6)}
                for key, value in zip(keys, values, strict=True)
                if ("similarity", key) not in ledger
            ]
        )
    return [ledger["similarity", key]["value"] for key in keys]


def _round(
    models: RefineModels, items: Sequence[RefineItem], number: int, settings: RefineConfig, ledger: Ledger
) -> list[Round]:
    """One round of fusion: a candidate for each item, with each judge's score."""
    candidates = _generate(models, models.fuser, items, number, "fuse", f"fuse, round {number}", settings, ledger)
    usable = {index: candidate.text for index, candidate in enumerate(candidates) if candidate.status == "ok"}
    scores = scores_of(models.judges, items, usable, f"round {number}", ledger)
    return [
        Round(
            round=number,
            candidate=candidate.text,
            status=candidate.status,
            note=candidate.note,
            scores=judgements.scores,
            mean=_mean(judgements.scores.values()),
            reasons=judgements.reasons,
        )
        for index, candidate in enumerate(candidates)
        for judgements in (scores.get(index, Scored({}, {})),)
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean over the judges that gave a score; None if none did."""
    answered = [value for value in values if value is not None]
    return round(sum(answered) / len(answered), 6) if answered else None


def _gold_mean(candidate: Round, gold_scores: Mapping[str, float | None]) -> float | None:
    """The gold answer's mean over those judges that also scored the candidate."""
    return _mean(gold_scores.get(name) for name, value in candidate.scores.items() if value is not None)


def _is_accepted(written: Text, similarity: float | None, settings: RefineConfig) -> bool:
    """Whether a rewriting is usable and passes the filter of Eq. 3."""
    return written.status == "ok" and similarity is not None and similarity >= settings.threshold


def _falls_short(candidate: Round, gold_scores: Mapping[str, float | None], settings: RefineConfig) -> str:
    """Why a candidate may not be chosen; "" if it may."""
    gold = _gold_mean(candidate, gold_scores)
    if candidate.mean is None:
        return "not scored"
    if candidate.mean < settings.accept_floor:
        return f"below the floor {settings.accept_floor:g}"
    # A judge that is a model does not score the gold answer, which it compares the candidate with.
    by_the_same = all(
        gold_scores.get(name) is not None for name, value in candidate.scores.items() if value is not None
    )
    if by_the_same and gold is not None and candidate.mean < gold:
        return f"below the gold answer's own {gold:.3f}"
    return ""


def _ends_rounds(candidate: Round, gold_scores: Mapping[str, float | None], settings: RefineConfig) -> bool:
    return (
        candidate.mean is not None
        and candidate.mean >= settings.accept
        and not _falls_short(candidate, gold_scores, settings)
    )


def _decide(
    item: RefineItem,
    written: Text,
    similarity: float | None,
    rounds: list[Round],
    gold_scores: Mapping[str, float | None],
    settings: RefineConfig,
) -> RefinedRow:
    """Eqs. 3 and 4 for one row: the best eligible round if the rewriting was accepted, else the gold answer."""
    accepted = _is_accepted(written, similarity, settings)
    scored = [candidate for candidate in rounds if candidate.mean is not None]
    eligible = [candidate for candidate in scored if not _falls_short(candidate, gold_scores, settings)]
    best = max(eligible, key=lambda candidate: (candidate.mean, -candidate.round), default=None)
    if not accepted:
        reason = f"{_why_rejected(written, similarity, settings)}, so the gold answer stays."
    elif not scored:
        statuses = ", ".join(candidate.status for candidate in rounds)
        notes = [f"; {name}: {why}" for candidate in rounds[-1:] for name, why in candidate.reasons.items()]
        notes += [f"; {candidate.note}" for candidate in rounds[-1:] if candidate.status == "failed"]
        reason = f"No judge could score a fused answer (rounds: {statuses}{''.join(notes)}), so the gold answer stays."
    elif best is None:
        nearest = max(scored, key=lambda candidate: (candidate.mean, -candidate.round))
        reason = (
            f"Round {nearest.round} scored {nearest.mean:.3f}, {_falls_short(nearest, gold_scores, settings)}, "
            "so the gold answer stays."
        )
    elif best.mean is not None and best.mean >= settings.accept:
        reason = f"Round {best.round} scored {best.mean:.3f}, at least {settings.accept:g}, and ended the rounds."
    else:
        reason = f"Round {best.round} scored {best.mean:.3f}, the best of {len(rounds)}."
    return RefinedRow(
        id=item.id,
        question=item.question,
        context=item.context,
        turns=[list(turn) for turn in item.turns],
        gold=item.gold,
        rewrite=written.text,
        rewrite_status=written.status,
        rewrite_note=written.note,
        similarity=similarity,
        accepted=accepted,
        rounds=rounds,
        gold_scores=dict(gold_scores),
        gold_mean=_mean(gold_scores.values()),
        answer=best.candidate if best else item.gold,
        chosen="fusion" if best else "gold",
        chosen_round=best.round if best else None,
        reason=reason,
    )


def _why_rejected(written: Text, similarity: float | None, settings: RefineConfig) -> str:
    if written.status == "copy":
        return "The rewriting is the gold answer word for word"
    if written.status == "facts":
        return f"The rewriting differs from the gold answer ({written.note})"
    if written.status == "ok":
        return f"Similarity {similarity:.3f} is below the threshold {settings.threshold:g}"
    return f"The rewriting is unusable ({written.status}{': ' + written.note if written.note else ''})"
