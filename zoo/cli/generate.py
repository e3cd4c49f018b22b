"""`zoo generate RUN`: text that comes as it is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli import output
from zoo.cli.options import Json


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a saved model.")],
    prompt: Annotated[str, typer.Option("--prompt", help="Beginning of the text.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=0, help="At most so many tokens.")] = 200,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the most likely token.")] = 0.8,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, help="Draw from the K best tokens only."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="The same seed gives the same text."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", min=0.0, help="Block diffusion: take all tokens at least so sure at once."),
    ] = None,
    sub_block: Annotated[
        int | None,
        typer.Option("--sub-block", min=1, help="Block diffusion: tokens of a block decided before the next ones."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue a text by a trained model, until its end or --max-new-tokens."""
    with output.working("loading"):
        import torch

        from zoo.architectures.block_diffusion import BlockDiffusionLM
        from zoo.architectures.storage import from_pretrained
        from zoo.errors import ConfigError, DataError
        from zoo.train.folder import tokenizer_of

        model = from_pretrained(run)
        if "decode" not in model.modes:
            raise DataError(f"{run} holds no language model")
        tokenizer = tokenizer_of(run)
    wanted = {k: v for k, v in (("threshold", threshold), ("sub_block", sub_block)) if v is not None}
    if wanted and not isinstance(model, BlockDiffusionLM):
        raise ConfigError(f"{run} takes one token after the other: --threshold and --sub-block are for block diffusion")
    if isinstance(model, BlockDiffusionLM):
        model.sampler = replace(model.sampler, **wanted)
    # a document begins behind the end of the one before, as in training
    ids = [tokenizer.end, *tokenizer.encode([prompt.encode("utf-8", "surrogateescape")])[0].tolist()]
    if max(ids) >= model.vocab_size:
        raise DataError(f"{run} knows {model.vocab_size} tokens and no text: its data are no text of this tokenizer")
    start, made, ended = time.perf_counter(), [], False
    say = (lambda text: None) if as_json else _print
    text = _Text(tokenizer.decode, say)
    say(prompt)
    for token in model.stream(torch.tensor([ids]), max_new_tokens, temperature, top_k=top_k, seed=seed):
        made.append(int(token))
        ended = made[-1] == tokenizer.end
        if ended:
            break
        text.add(made[-1])
    text.finish()
    seconds = time.perf_counter() - start
    if as_json:
        output.emit(_document(prompt, text.said, made, ended, seconds))
    else:
        print()


def _print(text: str) -> None:
    # a model can say what moves a terminal's cursor
    harmless = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    print(harmless, end="", flush=True)


def _document(prompt: str, text: str, made: list[int], ended: bool, seconds: float) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": text,
        "tokens": len(made),
        "stopped": "end" if ended else "length",
        "seconds": round(seconds, 3),
        "tokens_per_second": round(len(made) / seconds, 1),
    }


class _Text:
    """Decodes tokens one by one. What may still become a character is held back."""

    def __init__(self, decode: Callable[[list[int]], str], say: Callable[[str], None]):
        self.decode, self.say = decode, say
        self.ids: list[int] = []
        self.before, self.read = 0, 0  # ids that give context, ids whose text was said
        self.said = ""

    def add(self, token: int) -> None:
        self.ids.append(token)
        if not self._fresh().endswith("\N{REPLACEMENT CHARACTER}") or len(self.ids) - self.read > 8:
            self.finish()

    def finish(self) -> None:
        fresh = self._fresh()
        self.said += fresh
        self.say(fresh)
        self.before, self.read = self.read, len(self.ids)

    def _fresh(self) -> str:
        # some tokenizers drop a space in front, so the tokens before are decoded along
        return self.decode(self.ids[self.before :])[len(self.decode(self.ids[self.before : self.read])) :]
