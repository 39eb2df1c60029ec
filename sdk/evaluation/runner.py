"""A run: every setting answers the same samples, cell by cell, and what is done already is not done again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.cache import HeterogeneousCache
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.evaluation.answering import Turn
from thinkkv.sdk.evaluation.journal import Journal, Outcome
from thinkkv.sdk.evaluation.prefill import Prefill, prefill
from thinkkv.sdk.evaluation.sample import Encoded
from thinkkv.sdk.evaluation.scoring import divergence, loss
from thinkkv.sdk.evaluation.setting import Setting, profile_key
from thinkkv.sdk.evaluation.tasks.task import Task
from thinkkv.sdk.patching import PatchHandle, apply
from thinkkv.sdk.policies import Full
from thinkkv.sdk.profile import HeadProfile, fingerprint_of
from thinkkv.sdk.report import report

Question = Literal["in-window", "after"]
"""Whether the question is compressed with the context, or comes after the compression."""

ANSWER_MARGIN = 8
"""Tokens that an answer may have beyond the expected text."""


Progress = Callable[[str], Callable[[Iterable[Any]], Iterable[Any]]]


@dataclass(frozen=True)
class Cell:
    """One table cell of every setting: the samples of one task at one size, asked in one way."""

    task: Task
    size: int
    question: Question

    def __str__(self) -> str:
        return f"{self.task.name}, {self.size} tokens, question {self.question}"


@dataclass(frozen=True)
class Measured:
    """What one sample shows of one cache: the fields of an ``Outcome``."""

    score: float
    said: str
    loss: float | None
    divergence: float


@dataclass(frozen=True)
class Evaluation:
    """What is to be done.

    Args:
        model: not patched.
        tokenizer: its own.
        settings: compared.
        profiles: by policy name, for those that need or are given one.
        seed: of the samples.
        batch_tokens: prompts are attended to together up to so many tokens.
    """

    model: Any
    tokenizer: Any
    settings: Sequence[Setting]
    profiles: Mapping[str, HeadProfile]
    seed: int = 0
    batch_tokens: int = 8192

    @property
    def identity(self) -> dict[str, Any]:
        """What all outcomes of one run folder have in common."""
        return {
            "seed": self.seed,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "fingerprint": fingerprint_of(self.model),
        }

    @property
    def calibrations(self) -> dict[str, Any]:
        """What the profile of every policy that takes one was calibrated on, None where heads are chosen per prompt."""
        named = {profile_key(setting.policy.name): self.profiles.get(setting.policy.name) for setting in self.settings}
        return {key: dict(found.calibration) if found else None for key, found in named.items() if key}

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Of every policy that is compared, defaults too, by its name."""
        return {setting.name: setting.policy.options for setting in self.settings}

    def cells(self, tasks: Iterable[Task], sizes: Sequence[int], questions: Sequence[Question]) -> list[Cell]:
        """Every task at every size, asked in every way that it has.

        Raises:
            ThinkKVError: a size is beyond the model's context.
        """
        found = [
            Cell(task, size, question)
            for task in tasks
            for size in task.sizes(self.tokenizer, sizes)
            for question in _ways(task, questions)
        ]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        too_long = [cell for cell in found if limit is not None and cell.size >= limit]
        if too_long:
            raise ThinkKVError(f"{too_long[0]} is beyond the model's context of {limit} - lower --contexts")
        return found

    def run(self, cells: Sequence[Cell], samples: int, journal: Journal, progress: Progress) -> None:
        """Fill the journal.

        Args:
            cells: what to evaluate.
            samples: per cell.
            journal: has what was done before.
            progress: makes of a label a wrapper of what is iterated over.

        Raises:
            BudgetError: a policy cannot work with a ratio at a size; before anything is run.
        """
        with apply(self.model, policy="full") as handle:
            compressions = {setting: self._compression(setting, handle) for setting in self.settings}
            for cell in cells:
                smallest = min(len(_compressed(cell, sample)) for sample in self._samples(cell, range(1)))
                for compression in compressions.values():
                    compression.allocate(smallest)
            for cell in cells:
                self._run_cell(cell, samples, compressions, journal, progress)

    def _run_cell(
        self,
        cell: Cell,
        samples: int,
        compressions: Mapping[Setting, Compression],
        journal: Journal,
        progress: Progress,
    ) -> None:
        wanted = range(cell.task.count(samples))
        missing = [i for i in wanted if any(key(cell, i, setting) not in journal.outcomes for setting in compressions)]
        if not missing:
            return
        size = max(1, min(8, self.batch_tokens // cell.size))
        texts = _by_text(cell, missing)
        batches = [list(chain.from_iterable(texts[at : at + size])) for at in range(0, len(texts), size)]
        for batch in progress(str(cell))(batches):
            left = {
                setting: compression
                for setting, compression in compressions.items()
                if any(key(cell, i, setting) not in journal.outcomes for i in batch)
            }
            for outcomes in self._run_batch(cell, batch, left):
                journal.add(outcomes)

    def _run_batch(
        self, cell: Cell, numbers: Sequence[int], compressions: Mapping[Setting, Compression]
    ) -> Iterator[list[Outcome]]:
        """The outcomes of one batch of samples, setting by setting."""
        samples = dict(zip(numbers, self._samples(cell, numbers), strict=True))
        prompts: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, sample in samples.items():
            prompts[_compressed(cell, sample)].append(number)
        filled = prefill(self.model, list(prompts), compressions.values())
        rounds = [{number: samples[number] for number in asked} for asked in _rounds(list(prompts.values()))]
        whole = replace(next(iter(compressions.values())), policy=Full(), budget=Budget(ratio=1.0))
        reference: dict[int, torch.Tensor] = {}
        for turn, asked in self._turns(filled, filled.cache(whole), rounds):
            mine = list(asked.values())
            logits = self._ask(cell, mine, turn, filled)
            reference |= zip(asked, self._predicted(cell, mine, turn, logits), strict=True)
        for setting, compression in compressions.items():
            cache = filled.cache(compression)
            held = report(cache).bytes
            found: dict[int, Measured] = {}
            for turn, asked in self._turns(filled, cache, rounds):
                known = [reference[number] for number in asked]
                measured = self._measure(cell, list(asked.values()), turn, filled, known, compression == whole)
                found |= zip(asked, measured, strict=True)
            yield [
                Outcome(
                    cell.task.name, cell.question, cell.size, number, setting.name, setting.ratio,
                    len(_compressed(cell, samples[number])), found[number].score, found[number].said,
                    held.physical // len(prompts), held.used // len(prompts),
                    found[number].loss, found[number].divergence,
                )
                for number in numbers
            ]  # fmt: skip

    def _turns(
        self, filled: Prefill, cache: HeterogeneousCache, rounds: Sequence[Mapping[int, Encoded]]
    ) -> Iterator[tuple[Turn, Mapping[int, Encoded]]]:
        """For every round of questions the conversations in which they are asked, with nothing of another round."""
        turn = Turn(self.model, cache, filled.mask)
        for asked in rounds:
            yield (turn if asked is rounds[-1] else turn.copy()), asked

    def _measure(
        self,
        cell: Cell,
        samples: Sequence[Encoded],
        turn: Turn,
        filled: Prefill,
        reference: Sequence[torch.Tensor],
        is_whole: bool,
    ) -> list[Measured]:
        """What one round of samples shows."""
        logits = self._ask(cell, samples, turn, filled)
        # In a cache of their own: this one gets the model's answers.
        predicted = reference if is_whole else self._predicted(cell, samples, turn.copy(), logits)
        losses = [loss(*pair) for pair in zip(predicted, self._texts(cell, samples), strict=True)]
        distances = [divergence(*pair) for pair in zip(predicted, reference, strict=True)]
        if cell.task.metric == "perplexity":
            return [Measured(mine, "", None, distance) for mine, distance in zip(losses, distances, strict=True)]
        answers = self._answers(cell, samples, turn, logits)
        return [
            Measured(score, said, mine, distance)
            for (score, said), mine, distance in zip(answers, losses, distances, strict=True)
        ]

    def _ask(self, cell: Cell, samples: Sequence[Encoded], turn: Turn, filled: Prefill) -> torch.Tensor:
        """[B, V]: what follows the questions, which are fed now, or were compressed, too."""
        if cell.question == "in-window" or cell.task.metric == "perplexity":  # whose question is what is scored
            return filled.logits
        return turn.feed([sample.question for sample in samples], keep=1)[:, -1]

    def _predicted(
        self, cell: Cell, samples: Sequence[Encoded], turn: Turn, logits: torch.Tensor
    ) -> list[torch.Tensor]:
        """[T, V] for each sample: log-probabilities in the places of the tokens that count."""
        if cell.task.metric == "perplexity":
            # The first token's come from the prompt's own forward, which saw everything.
            return turn.predictions([sample.question for sample in samples], None)
        return turn.predictions([self._expected(sample) for sample in samples], logits)

    def _texts(self, cell: Cell, samples: Sequence[Encoded]) -> list[Sequence[int]]:
        """Those tokens: of the continuation without its first, or of the right answer."""
        if cell.task.metric == "perplexity":
            return [sample.question[1:] for sample in samples]
        return [self._expected(sample) for sample in samples]

    def _answers(self, cell: Cell, samples: Sequence[Encoded], turn: Turn, logits: Any) -> list[tuple[float, str]]:
        """Score and text of each answer."""
        lengths = [self._new_tokens(sample) for sample in samples]
        said = turn.answer(logits, max(lengths), self._stop())
        texts = [
            self.tokenizer.decode(ids[:length], skip_special_tokens=True)
            for ids, length in zip(said, lengths, strict=True)
        ]
        return [(cell.task.score(sample.sample, text), text) for sample, text in zip(samples, texts, strict=True)]

    def _expected(self, sample: Encoded) -> list[int]:
        """Token ids of the right answer, as it would follow the question."""
        ids: list[int] = self.tokenizer(f" {sample.sample.expected}", add_special_tokens=False).input_ids
        return ids

    def _new_tokens(self, sample: Encoded) -> int:
        """Tokens that an answer may have, whatever its batch."""
        return ANSWER_MARGIN + len(self.tokenizer(sample.sample.expected, add_special_tokens=False).input_ids)

    def _stop(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def _samples(self, cell: Cell, numbers: Iterable[int]) -> Iterator[Encoded]:
        return (cell.task.sample(self.tokenizer, cell.size, number, self.seed) for number in numbers)

    def _compression(self, setting: Setting, handle: PatchHandle) -> Compression:
        profile = self.profiles.get(setting.policy.name)
        policy = setting.policy if profile is None else profile.fix(setting.policy)
        return Compression(policy, setting.budget, handle.shapes, dtype=self.model.dtype)


def key(cell: Cell, number: int, setting: Setting) -> tuple[Any, ...]:
    """Of an outcome in the journal."""
    return cell.task.name, cell.question, cell.size, number, setting.name, setting.ratio


def _by_text(cell: Cell, numbers: Sequence[int]) -> list[list[int]]:
    """Samples whose text is compressed alone, together with those of the same text; every other by itself."""
    found: dict[int, list[int]] = {}
    for number in numbers:
        found.setdefault(cell.task.text_of(number) if cell.question == "after" else number, []).append(number)
    return list(found.values())


def _rounds(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """One sample of each prompt a round, until all have been asked; where one has fewer, its last is asked again."""
    return [[mine[min(turn, len(mine) - 1)] for mine in prompts] for turn in range(max(map(len, prompts)))]


def _ways(task: Task, questions: Sequence[Question]) -> Sequence[Question]:
    """A continuation comes after the compression, or there would be nothing to measure."""
    return ("after",) if task.metric == "perplexity" else questions


def _compressed(cell: Cell, sample: Encoded) -> tuple[int, ...]:
    """The tokens that are in the cache when it is compressed."""
    return sample.context if cell.question == "after" else sample.context + sample.question
