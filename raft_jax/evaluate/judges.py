"""Domain accuracy: the judges of stage 1 accept or reject a model's answers; each verdict is recorded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import jax

from raft_jax.config import ANSWER_PROGRAMS, STUDENT, Config
from raft_jax.data.examples import Example
from raft_jax.data.prompts import load_prompts
from raft_jax.errors import InputError
from raft_jax.evaluate.agreement import krippendorff_alpha, majority
from raft_jax.models import Model
from raft_jax.models.encoder import Encoder
from raft_jax.refine.chat import Chat
from raft_jax.refine.endpoint import Endpoint, key_of
from raft_jax.refine.generate import RefineItem
from raft_jax.refine.judge import CoverageJudge, Judge, SimilarityJudge
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.llm_judge import LLMJudge
from raft_jax.refine.roles import LocalModel, load_local, local_judge, require_endpoint
from raft_jax.refine.run import item_of
from raft_jax.refine.scoring import scores_of
from raft_jax.scores import DomainAnswer, Estimate, GeneralAnswer, ModelScores
from raft_jax.sources import require_source

Answer = TypeVar("Answer", DomainAnswer, GeneralAnswer)
STREAM = 3  # of the random numbers of judges on this machine; the refinement has 0 to 2


class Judges:
    """The judges of `evaluate.judges`, and the ledger with their verdicts.

    A verdict's key is a hash of the judge's identity (model, settings, prompt, seed), the question, the gold answer and
    the answer. So no answer is judged twice, whichever model gave it, and a judge is not asked again after a change of
    other settings.

    Args:
      config: the run's.
      base: the base model, and its identity.
      encoder: makes the sentence encoder, where a judge needs it.
      ledger: of the verdicts.
      mesh: of judges on this machine.
    """

    def __init__(
        self,
        config: Config,
        base: tuple[Model, str],
        encoder: Callable[[], Encoder],
        ledger: Ledger,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.config, self.ledger, self.mesh = config, ledger, mesh
        self._base, self._encoder = base, encoder
        self._endpoints: list[Endpoint] = []
        prompts, roles = load_prompts(config.refine.prompts), config.evaluate.judges
        chats = {role: self._chat(role) for role in roles if role not in ANSWER_PROGRAMS}

        def asked(role: str, prompt: Callable, name: str) -> LLMJudge:
            return LLMJudge(chats[role], prompt, seed=config.seed, prompt_hash=prompts.digest(name))

        self.judges: list[Judge] = [
            asked(role, prompts.judge, "judge") if role in chats else self._program(role) for role in roles
        ]
        self.open_judges: list[Judge] = [asked(role, prompts.judge_open, "judge_open") for role in chats]

    def _program(self, role: str) -> Judge:
        return SimilarityJudge(self._encoder()) if role == "similarity" else CoverageJudge()

    def _chat(self, role: str) -> Chat:
        settings = self.config.model
        if role in self.config.endpoints:
            if jax.process_count() > 1:
                raise InputError(
                    f"evaluate.judges: several processes would each ask endpoints.{role}; run `raft-jax evaluate` in "
                    "one process, or set evaluate.judges=[]"
                )
            self._endpoints.append(Endpoint(role, self.config.endpoints[role]))
            return self._endpoints[-1]
        model, identity = self._base
        if role == STUDENT:
            local = LocalModel(model, settings.source, identity)
        else:
            local = load_local(role, settings, model, self.mesh)
        key = jax.random.fold_in(jax.random.key(self.config.seed), STREAM)
        return local_judge(role, local, self.config.evaluate.batch_size, self.mesh, key)

    def judged(self, name: str, scores: ModelScores, questions: Sequence[Example]) -> ModelScores:
        """The scores of a model with the judges' verdicts on its answers; earlier verdicts in them are replaced.

        Answers to open general prompts are judged by the judges that are models, without a reference.

        Args:
          name: the model's, for the progress lines; judges are not told it.
          scores: with its answers.
          questions: with what the answers were given to.
        """
        items = {question.id: item_of(question) for question in questions}
        answers = self._judged(self.judges, scores.answers, items, f"answers of {name}")
        scores = with_verdicts(scores, answers, self.config)
        if not self.open_judges:
            return scores
        prompts = {
            answer.id: RefineItem(answer.id, answer.prompt, "")
            for answer in scores.general_answers
            if answer.correct is None
        }
        general = self._judged(self.open_judges, scores.general_answers, prompts, f"general answers of {name}")
        return with_open_verdicts(scores, general, self.config)

    def _judged(
        self, judges: Sequence[Judge], answers: Sequence[Answer], items: Mapping[str, RefineItem], title: str
    ) -> list[Answer]:
        """Answers with the scores of judges, where there is an item for them; an empty one answers nothing."""
        judged = [answer for answer in answers if answer.id in items]
        texts = {index: answer.answer for index, answer in enumerate(judged) if answer.answer.strip()}
        by_index = scores_of(judges, [items[one.id] for one in judged], texts, title, self.ledger) if texts else {}
        by_id = {answer.id: by_index.get(index) for index, answer in enumerate(judged)}
        empty = dict.fromkeys((judge.name for judge in judges), 0.0)
        return [
            answer
            if answer.id not in by_id
            else replace(answer, judges=dict(empty), reasons={})
            if (judgements := by_id[answer.id]) is None
            else replace(answer, judges=judgements.scores, reasons=judgements.reasons)
            for answer in answers
        ]

    def close(self) -> None:
        """Ends the connections to servers."""
        for endpoint in self._endpoints:
            endpoint.close()


def with_verdicts(scores: ModelScores, answers: Sequence[DomainAnswer], config: Config) -> ModelScores:
    """Scores with judged answers: whether each is accepted, the share of those that are, and the judges' agreement."""
    answers, accepted, agreement = _verdicts(answers, config)
    return replace(scores, domain=replace(scores.domain, accepted=accepted, agreement=agreement), answers=answers)


def with_open_verdicts(scores: ModelScores, answers: Sequence[GeneralAnswer], config: Config) -> ModelScores:
    """The same for answers to general prompts."""
    answers, accepted, agreement = _verdicts(answers, config)
    general = replace(scores.general, accepted=accepted, agreement=agreement)
    return replace(scores, general=general, general_answers=answers)


def _verdicts(answers: Sequence[Answer], config: Config) -> tuple[list[Answer], Estimate, float | None]:
    """Answers with the majority's verdicts, the share that is accepted, and the judges' agreement."""
    accept, names = config.evaluate.accept, config.evaluate.judges
    answers = [replace(answer, accepted=majority(answer.judges.values(), accept)) for answer in answers]
    verdicts = [
        [None if (score := answer.judges.get(name)) is None else float(score >= accept) for answer in answers]
        for name in dict.fromkeys(name for answer in answers for name in answer.judges)
    ]
    agreement = krippendorff_alpha(verdicts) if len(names) > 1 else None
    return answers, Estimate.of([answer.accepted for answer in answers if answer.accepted is not None]), agreement


def require_judges(config: Config) -> Iterator[str]:
    """Checks the judges of answers without computing anything; yields a line on each server.

    Raises:
      InputError: a model is not at its source, a key is missing, or a server does not answer or refuses the key.
    """
    load_prompts(config.refine.prompts)
    for number, role in enumerate(config.evaluate.judges):
        setting = f"evaluate.judges[{number}]"
        if (settings := config.endpoints.get(role)) is not None:
            key_of(role, settings)
            yield require_endpoint(role, settings, setting)
        elif role not in (STUDENT, *ANSWER_PROGRAMS):
            require_source(setting, role)
