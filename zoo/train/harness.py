"""The only door to lm-evaluation-harness: a causal language model of the zoo as its `LM`, and its tasks by name.

A context is read once into a streaming state, whose copies score all continuations that are asked of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from zoo.architectures.model import evaluating
from zoo.errors import ConfigError, DataError, ZooError
from zoo.train.evaluate import Advance
from zoo.train.tokenizer import Tokenizer

SEGMENT = 2048  # tokens of a context that are read at once
AT_ONCE = 32  # continuations that are scored together
_NEW_TOKENS = 256  # of a task that names no limit


class Scorer:
    """What the harness asks of a model. `max_length`: tokens that a prediction sees at most; what stands before them
    is cut off."""

    def __init__(self, model: Any, tokenizer: Tokenizer, max_length: int, advance: Advance = lambda done, total: None):
        super().__init__()
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.advance, self.done, self.total = advance, 0, 0
        self._device = next(model.parameters()).device

    def _counted(self, requests: Sequence[Any]) -> None:
        self.total += len(requests)

    def _one_done(self) -> None:
        self.done += 1
        self.advance(self.done, self.total)

    # ----------------------------------------------------------------------------------- interface
    def loglikelihood(self, requests: Sequence[Any], **unused: Any) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether greedy decoding says it) of each (context, continuation)."""
        self._counted(requests)
        pairs = [self._split(*request.args) for request in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: pairs[i][0])  # equal contexts stand together
        for context, group in groupby(order, key=lambda i: pairs[i][0]):
            members = list(group)
            for i, result in zip(members, self.score(context, [pairs[i][1] for i in members]), strict=True):
                found[i] = result
                self._one_done()
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], **unused: Any) -> list[float]:
        """log p of each text, every token of it predicted once. A text longer than max_length is read in windows."""
        self._counted(requests)
        found = []
        for request in requests:
            windows = self._windows(self._ids(request.args[0]))
            found.append(sum((self.score(context, [rest])[0][0] for context, rest in windows), 0.0))
            self._one_done()
        return found

    def generate_until(self, requests: Sequence[Any], **unused: Any) -> list[str]:
        """What follows each (context, options), up to the first of the texts `until`, or the end of the document."""
        self._counted(requests)
        found = []
        for request in requests:
            context, options = request.args
            found.append(self._generate(context, dict(options)))
            self._one_done()
        return found

    # ------------------------------------------------------------------------------------- scoring
    def score(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """log p of each continuation of a context, and whether each of its tokens is the most likely one."""
        longest = max(map(len, continuations))
        if not longest:
            return [(0.0, True)] * len(continuations)
        context = list(context)[-max(1, self.max_length + 1 - longest) :]
        found: list[tuple[float, bool]] = []
        with evaluating(self.model):
            state = self.model.init_state(1, len(context) + longest)
            tokens = torch.tensor([context], device=self._device)
            for at in range(0, len(context), SEGMENT):
                hidden = self.model.hidden(tokens[:, at : at + SEGMENT], state)[:, -1:]
            first = self.model.head(hidden).float()  # [1, 1, V]
            for at in range(0, len(continuations), AT_ONCE):
                found += self._score_some(state, first, continuations[at : at + AT_ONCE])
        return found

    def _score_some(self, state: Any, first: Any, some: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        rows, longest = len(some), max(map(len, some))
        labels = torch.full((rows, max(1, longest)), -1, device=self._device)
        for row, ids in enumerate(some):
            labels[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        logits = first.expand(rows, 1, -1)
        if longest > 1:
            copies = state.rows(torch.zeros(rows, dtype=torch.int64, device=self._device))
            more = self.model.head(self.model.hidden(labels[:, :-1].clamp(min=0), copies)).float()
            logits = torch.cat([logits, more], 1)
        known = labels >= 0  # behind a shorter continuation stands what nobody reads
        told = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        sums = told.double().masked_fill(~known, 0).sum(1)
        greedy = ((logits.argmax(-1) == labels) | ~known).all(1)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        stops = options.pop("until", None) or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        new = int(options.pop("max_gen_toks", _NEW_TOKENS))
        temperature = float(options.pop("temperature", 0.0)) if options.pop("do_sample", False) else 0.0
        top_k = options.pop("top_k", None) or None
        ids = [self.tokenizer.end, *self._ids(context)][-max(1, self.max_length - new) :]
        made: list[int] = []
        text = ""
        for token in self.model.stream(torch.tensor([ids], device=self._device), new, temperature, top_k=top_k):
            if int(token) == self.tokenizer.end:
                break
            made.append(int(token))
            text = self.tokenizer.decode(made)
            if cut := [at for stop in stops if stop and (at := text.find(stop)) >= 0]:
                return text[: min(cut)]
        return text

    # ------------------------------------------------------------------------------------- tokens
    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode([text.encode("utf-8", "replace")])[0].tolist()

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context, `end` in front, and of what follows it, as they are in the text of both: a space that
        parts them belongs to the second."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        before, whole = self._ids(bare), self._ids(bare + continuation)
        return [self.tokenizer.end, *before], whole[len(before) :]

    def _windows(self, ids: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(context, tokens to be predicted): every token once, the last window with as much context as fits."""
        given = [self.tokenizer.end, *ids]
        for begin in range(0, len(ids), self.max_length):
            end = min(begin + self.max_length, len(ids))
            yield given[max(0, end - self.max_length) : begin + 1], list(ids[begin:end])


def run_task(
    name: str,
    model: Any,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    limit: int | None = None,
    advance: Advance = lambda done, total: None,
) -> dict[str, float]:
    """Figures of one task or group of the harness, by its name. Its data come from where the task says, mostly from
    the hub. limit: only so many documents."""
    try:
        import lm_eval  # type: ignore[import-not-found]
        from lm_eval.api.model import LM  # type: ignore[import-not-found]
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    except ImportError as error:
        raise ZooError(f"lm_eval:{name} needs the extra `eval`: pip install 'block-zoo[eval]' ({error})") from error

    class Adapter(Scorer, LM):
        pass

    manager = TaskManager()
    if not manager.match_tasks([name]):
        raise ConfigError(f"lm_eval:{name}: the harness has no task of this name (lm_eval --tasks list)")
    try:
        found = lm_eval.simple_evaluate(
            model=Adapter(model, tokenizer, max_length, advance),
            tasks=[name],
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
        )
    except OSError as error:  # a data set that cannot be had
        raise DataError(f"lm_eval:{name}: {str(error).strip().splitlines()[0]}") from error
    if not found:
        raise ZooError(f"lm_eval:{name}: the harness gave no result")
    return _figures(found["results"])


def _figures(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """`metric` of a task, or `task metric` of several; those under a filter other than none with its name."""
    figures = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if (
                isinstance(value, (int, float))
                and not metric.endswith("_stderr")
                and metric not in ("sample_len", "alias")
            ):
                named = metric if kind in ("", "none") else f"{metric} {kind}"
                figures[named if len(results) == 1 else f"{task} {named}"] = float(value)
    return figures
