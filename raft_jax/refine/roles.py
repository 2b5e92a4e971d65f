"""The models of the refinement as the config names them: the student, other models, servers and programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.config import PROGRAMS, STUDENT, Config, EndpointConfig, ModelConfig
from raft_jax.data.prompts import Conversation, Prompts, answered, load_prompts, question_of
from raft_jax.errors import InputError
from raft_jax.models import Model, Tokenizer, load_pretrained
from raft_jax.models.encoder import Encoder
from raft_jax.refine.chat import Chat
from raft_jax.refine.endpoint import Endpoint, key_of
from raft_jax.refine.generate import SECOND_TRY, Generator, LocalGenerator, RefineItem, task_prompt
from raft_jax.refine.judge import CoverageJudge, Judge, LikelihoodJudge, LogLikelihood, SimilarityJudge
from raft_jax.refine.llm_judge import LLMJudge
from raft_jax.refine.remote import ChatGenerator, LocalChat
from raft_jax.refine.run import RefineModels
from raft_jax.sampling import Sampler, Scorer
from raft_jax.sources import model_identity, require_source

LOCAL_JUDGEMENT = 512  # longest judgement of a model on this machine, in tokens


class LocalModel(NamedTuple):
    """A model on this machine, its name, and what identifies it and its settings."""

    model: Model
    name: str
    identity: str


class Roles:
    """Makes the models of the refinement; each model is loaded once, and each server has one client.

    Args:
      config: the run's.
      student: the model that is trained.
      student_identity: identifies it and its settings.
      mesh: of the models on this machine.
    """

    def __init__(self, config: Config, student: Model, student_identity: str, mesh: jax.sharding.Mesh | None):
        self.config, self.mesh = config, mesh
        self.prompts = load_prompts(config.refine.prompts)
        self._local = {STUDENT: LocalModel(student, config.model.source, student_identity)}
        self._key = jax.random.key(config.seed)

    @cached_property
    def endpoints(self) -> dict[str, Endpoint]:
        """The clients of the endpoints that have a role."""
        if (names := endpoints_in_use(self.config)) and jax.process_count() > 1:
            raise InputError(
                f"endpoints.{names[0]}: several processes would each ask the server; run `raft-jax refine` in one "
                "process first, and copy its folder refined/ to the run_dir of this run"
            )
        return {name: Endpoint(name, self.config.endpoints[name]) for name in names}

    def models(self, encoder: Encoder) -> RefineModels:
        """The models of all roles.

        Raises:
          InputError: a model cannot be loaded, or the key of an endpoint is missing.
        """
        settings, prompts = self.config.refine, self.prompts
        student = self._local[STUDENT].model.tokenizer
        written_elsewhere = {settings.rewriter, settings.fuser} != {STUDENT}
        return RefineModels(
            self._generator(
                settings.rewriter,
                "rewrite",
                lambda item: prompts.rewrite(item.gold, *item.asked(settings.terse_words)),
                0,
            ),
            encoder,
            self._generator(
                settings.fuser,
                "fuse",
                lambda item: prompts.fuse(item.gold, item.rewrite, *item.asked(settings.terse_words)),
                1,
            ),
            [self._judge(role, encoder) for role in settings.judges],
            partial(renders, student, prompts),
            partial(_fits, student, self.config.refine_max_new_tokens)
            if written_elsewhere
            else lambda text, times: True,
            self._has_room,
        )

    def _has_room(self, item: RefineItem) -> bool:
        """Whether models on this machine take a rewriting of the length of a second try, and then a fusion."""
        settings, prompts, limit = self.config.refine, self.prompts, self.config.refine_max_new_tokens
        asked = item.asked(settings.terse_words)
        longest = SECOND_TRY * limit
        needed = [
            (STUDENT, question_of(item), longest),  # where the rewriting is trained on
            (settings.rewriter, prompts.rewrite(item.gold, *asked), longest),
            (settings.fuser, prompts.fuse(item.gold, "", *asked), longest + limit),
        ]
        return all(
            role in self.endpoints or _takes(self._model(role).model, conversation, num_tokens)
            for role, conversation, num_tokens in needed
        )

    @cached_property
    def likelihood(self) -> LogLikelihood:
        """The student's log-likelihood of texts."""
        student = self._local[STUDENT]
        return LogLikelihood(self._scorer, student.model.params, student.identity)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self._local[STUDENT].model, mesh=self.mesh)

    def identities(self) -> list[str]:
        """What identifies the models that are not the student; empty where there are none."""
        roles = [role for role in self.config.model_roles.values() if role != STUDENT]
        identities = [
            self.endpoints[role].identity if role in self.endpoints else self._model(role).identity for role in roles
        ]
        judges = [role for role in self.config.refine.judges if role not in PROGRAMS]
        return [*identities, self.prompts.texts["judge"]] if judges else identities

    def _generator(
        self, role: str, purpose: str, prompt: Callable[[RefineItem], Conversation], stream: int
    ) -> Generator:
        settings, template = self.config.refine, self.prompts.digest(purpose)
        if role in self.endpoints:
            return ChatGenerator(
                self.endpoints[role],
                prompt,
                purpose=purpose,
                seed=self.config.seed,
                temperature=settings.temperature,
                prompt_hash=template,
            )
        local = self._model(role)
        return LocalGenerator(
            Sampler(local.model, settings.batch_size, self.mesh),
            local.model.params,
            prompt,
            key=jax.random.fold_in(self._key, stream),
            model=local.identity,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=self.config.refine_max_new_tokens,
            record={"model": local.name, "prompt": template},
        )

    def _judge(self, role: str, encoder: Encoder) -> Judge:
        student = self._local[STUDENT]
        programs: dict[str, Callable[[], Judge]] = {
            "similarity": lambda: SimilarityJudge(encoder),
            "coverage": CoverageJudge,
            "likelihood": lambda: LikelihoodJudge(self._scorer, student.model.params, student.identity),
        }
        if role in programs:
            return programs[role]()
        return LLMJudge(
            self._chat(role), self.prompts.judge, seed=self.config.seed, prompt_hash=self.prompts.digest("judge")
        )

    def _chat(self, role: str) -> Chat:
        if role in self.endpoints:
            return self.endpoints[role]
        local = self._model(role)
        return local_judge(role, local, self.config.refine.batch_size, self.mesh, jax.random.fold_in(self._key, 2))

    def _model(self, role: str) -> LocalModel:
        """A model on this machine, loaded at its first use with the settings of the student."""
        if role not in self._local:
            self._local[role] = load_local(role, self.config.model, self._local[STUDENT].model, self.mesh)
        return self._local[role]

    def close(self) -> None:
        """Ends the connections to servers."""
        for endpoint in self.endpoints.values():
            endpoint.close()


def load_local(source: str, settings: ModelConfig, student: Model, mesh: jax.sharding.Mesh | None) -> LocalModel:
    """Another model on this machine, with the student's settings and date."""
    model = load_pretrained(source, jnp.dtype(settings.dtype), mesh, attention=settings.attention)
    model.tokenizer.date, model.tokenizer.thinking = student.tokenizer.date, settings.thinking
    return LocalModel(model, source, model_identity(source, settings.dtype, settings.thinking))


def local_judge(
    role: str, local: LocalModel, batch_size: int, mesh: jax.sharding.Mesh | None, key: jax.Array
) -> LocalChat:
    """A model on this machine that is asked for judgements."""
    return LocalChat(
        role.replace("#", "_"),  # keys of the ledger have # between their parts
        Sampler(local.model, batch_size, mesh),
        local.model.params,
        key=key,
        model=local.name,
        identity=local.identity,
        max_new_tokens=LOCAL_JUDGEMENT,
    )


def endpoints_in_use(config: Config) -> list[str]:
    """The names of the endpoints that have a role, in the order of the roles."""
    return list(dict.fromkeys(role for role in config.model_roles.values() if role in config.endpoints))


def require_roles(config: Config) -> Iterator[str]:
    """Checks models, prompts and servers of the refinement without computing anything; yields a line on each server.

    Raises:
      InputError: another model is not at its source, a prompt lacks a placeholder, a key is missing, or a server does
        not answer or refuses the key; names the setting.
    """
    require_local_roles(config)
    names = endpoints_in_use(config)
    for name in names:
        key_of(name, config.endpoints[name])
    for name in names:
        roles = ", ".join(key for key, role in config.model_roles.items() if role == name)
        yield require_endpoint(name, config.endpoints[name], roles)


def require_endpoint(name: str, settings: EndpointConfig, roles: str) -> str:
    """A line on a server that answers; raises InputError if it does not, or refuses the key."""
    with closing(Endpoint(name, settings)) as endpoint:
        endpoint.require_answer()
    return f"endpoint {name}: {settings.model} at {settings.base_url} answers; {roles}"


def require_local_roles(config: Config) -> None:
    """Checks prompts and the sources of other models; raises InputError as `require_roles` does."""
    load_prompts(config.refine.prompts)
    for key, role in config.model_roles.items():
        if role != STUDENT and role not in config.endpoints:
            require_source(key, role)


def renders(tokenizer: Tokenizer, prompts: Prompts, item: RefineItem, text: str) -> bool:
    """Whether the model's chat template accepts a text as an answer and as the answer in the teacher's prompt."""
    try:
        tokenizer.chat_answer(answered(question_of(item), text))
        tokenizer.chat_prompt(prompts.teacher(item.question, text, item.context, item.turns))
    except InputError:
        return False
    return True


def _fits(tokenizer: Tokenizer, max_new_tokens: int, text: str, times: int) -> bool:
    return len(tokenizer.encode(text)) <= times * max_new_tokens


def _takes(model: Model, conversation: Conversation, num_tokens: int) -> bool:
    """Whether so many tokens after a prompt are within the model's positions."""
    return len(task_prompt(model.tokenizer, conversation)) + num_tokens <= model.config.max_positions
