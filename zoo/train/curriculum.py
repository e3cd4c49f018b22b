"""Parts of a model that come in, stand still or change while it is trained.

What holds in a step is a function of the share of the run that lies before it, (step - 1) / (steps - 1): nothing is
kept in a checkpoint. After the last stage the model is the one that its configuration describes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.contract import Block
from zoo.errors import ConfigError, Problem, did_you_mean
from zoo.sections import StageSection, TrainSection
from zoo.train.select import modules, nothing, parameters

STRENGTH = "strength"


@dataclass(frozen=True)
class Ramp:
    """A number of one module: `start` up to `begin`, then evenly to `end` at `until`. Shares of the run."""

    set: Callable[[float], None]
    start: float
    end: float
    begin: float
    until: float

    def at(self, progress: float) -> float:
        """The value at a share of the run."""
        passed = (progress - self.begin) / (self.until - self.begin)
        if passed >= 1:
            return self.end  # exactly, so that the last step trains what is saved
        return self.start + max(0.0, passed) * (self.end - self.start)


class Curriculum:
    """The stages of a recipe for one model, or for a part of it: a pattern that names nothing is passed over, see
    `check`. Call `begin(progress)` before a step."""

    def __init__(self, model: nn.Module, stages: Sequence[StageSection]):
        self.switches: dict[Block, _Switch] = {}
        self.ramps: list[Ramp] = []
        # (from, until, parameters, blocks that are left out)
        self.rests: list[tuple[float, float, list[nn.Parameter], list[_Switch]]] = []
        self.frozen: list[nn.Parameter] = []
        self.resting: set[nn.Module] = set()
        begin = 0.0
        for stage in stages:
            for pattern in stage.enable:
                switches = [self._switch(block) for block in blocks(model, pattern)]
                self.rests.append((0.0, begin, _parameters(model, pattern), switches))
            for pattern in stage.freeze:
                self.rests.append((begin, stage.until, _parameters(model, pattern), []))
            for pattern, options in stage.ramp.items():
                for option, way in options.items():
                    for set_, now in self._numbers(model, pattern, option):
                        start, end = way if isinstance(way, tuple) else (way, now)
                        self.ramps.append(Ramp(set_, start, end, begin, stage.until))
            begin = stage.until

    def begin(self, progress: float) -> None:
        """Bring the model into the state that it has in a step; see the module for `progress`."""
        at_rest = [(ps, switches) for start, until, ps, switches in self.rests if start <= progress < until]
        self.frozen = list({id(p): p for ps, _ in at_rest for p in ps}.values())
        out = {switch for _, switches in at_rest for switch in switches}
        for switch in self.switches.values():
            switch.off = switch in out
        self.resting = {m for block, switch in self.switches.items() if switch.off for m in block.modules()}
        for ramp in self.ramps:
            ramp.set(ramp.at(progress))

    def drop_gradients(self) -> None:
        """Take the gradients of parameters that stand still: an optimizer passes over what has none."""
        for p in self.frozen:
            p.grad = None

    def _switch(self, block: Block) -> _Switch:
        if block not in self.switches:
            self.switches[block] = _Switch(block)
        return self.switches[block]

    def _numbers(self, model: nn.Module, pattern: str, option: str) -> Iterator[tuple[Callable[[float], None], float]]:
        """(how to set it, its value) for every number called `option` in what `pattern` names."""
        if option == STRENGTH:
            for block in blocks(model, pattern):
                yield self._switch(block).set_strength, 1.0
        else:
            for module in _with_number(model, pattern, option):
                yield _setter(module, option), float(getattr(module, option))


class _Switch:
    """Stands in front of a block's forward: leaves it out, or multiplies what it gives."""

    def __init__(self, block: Block):
        self.off, self.whole = False, True
        self.strength = torch.ones((), device=block.reference_parameter.device)
        forward = block.forward

        def run(x: Tensor, **given: Any) -> Tensor:
            if self.off:
                return torch.zeros_like(x)
            y = forward(x, **given)
            return y if self.whole else y * self.strength.to(y.dtype)

        block.forward = run  # not a module around it: that would rename every parameter

    def set_strength(self, value: float) -> None:
        # a tensor, because compiled code is compiled again for every other Python number it meets
        self.whole = value == 1.0
        self.strength.fill_(value)


def blocks(model: nn.Module, pattern: str) -> list[Block]:
    """The blocks that `pattern` names, or that lie in the nodes it names."""
    found = (m for node in modules(model, pattern).values() for m in node.modules() if isinstance(m, Block))
    return list(dict.fromkeys(found))


def scale_auxiliary_losses(model: nn.Module, factors: dict[str, float]) -> None:
    """Multiply the coefficients of auxiliary losses, which every block and router keeps under names in `_coef`."""
    for pattern, factor in factors.items():
        for module in modules(model, pattern).values():
            for inside in module.modules():
                for name in _coefficients(inside):
                    setattr(inside, name, factor * getattr(inside, name))


def check(model: nn.Module, train: TrainSection) -> None:
    """Raise ConfigError where `aux` or `curriculum` name what this whole model does not have."""
    for pattern in train.aux:
        named = modules(model, pattern).values()
        if not named:
            raise nothing(model, pattern, f"train.aux.{pattern}")
        if not any(_coefficients(inside) for module in named for inside in module.modules()):
            raise ConfigError([Problem("has no auxiliary loss", f"train.aux.{pattern}")])
    ramped: set[tuple[int, str]] = set()
    for i, stage in enumerate(train.curriculum):
        where = f"train.curriculum[{i}]"
        for pattern in stage.freeze:
            if not parameters(model, pattern):
                raise nothing(model, pattern, f"{where}.freeze")
        for pattern in (*stage.enable, *(p for p, options in stage.ramp.items() if STRENGTH in options)):
            if not modules(model, pattern):
                raise nothing(model, pattern, where)
            if not blocks(model, pattern):
                raise ConfigError([Problem(f"{pattern!r} is no block and contains none", where)])
        for pattern, options in stage.ramp.items():
            for option, way in options.items():
                _check_ramp(model, pattern, option, way, ramped, f"{where}.ramp.{pattern}.{option}")


def _check_ramp(
    model: nn.Module, pattern: str, option: str, way: Any, ramped: set[tuple[int, str]], where: str
) -> None:
    if option == STRENGTH:
        targets: list[Any] = list(blocks(model, pattern))
    else:
        named = modules(model, pattern)
        if not named:
            raise nothing(model, pattern, where)
        targets = _with_number(model, pattern, option)
        if not targets:
            known = sorted({n for node in named.values() for m in node.modules() for n in _numbers_of(m)})
            hint = did_you_mean(option, known) or "; numbers there: " + ", ".join([STRENGTH, *known])
            raise ConfigError([Problem(f"{pattern} has no number of this name{hint}", where)])
    for target in targets:
        if (id(target), option) in ramped:
            raise ConfigError([Problem("is ramped already by an earlier entry", where)])
        ramped.add((id(target), option))
        now = 1.0 if option == STRENGTH else getattr(target, option)
        # a buffer is saved as it ends; anything else is built anew from the configuration
        if isinstance(way, tuple) and not isinstance(now, Tensor) and way[1] != now:
            text = f"must end at the configured value {now:g}, which the saved model has, got {way[1]:g}"
            raise ConfigError([Problem(text, where)])


def _parameters(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    names = parameters(model, pattern)
    return [p for name, p in model.named_parameters() if name in names]


def _with_number(model: nn.Module, pattern: str, option: str) -> list[nn.Module]:
    inside = (m for node in modules(model, pattern).values() for m in node.modules())
    return [m for m in dict.fromkeys(inside) if option in _numbers_of(m)]


def _numbers_of(module: nn.Module) -> set[str]:
    """Names of what can be ramped: numbers, and buffers that hold one."""
    plain = {n for n, v in vars(module).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    buffers = {n for n, v in module.named_buffers(recurse=False) if v.dim() == 0 and v.is_floating_point()}
    return {n for n in plain | buffers if not n.startswith("_")} - {"training"}


def _coefficients(module: nn.Module) -> list[str]:
    return [name for name in _numbers_of(module) if name.endswith("_coef")]


def _setter(module: nn.Module, option: str) -> Callable[[float], None]:
    now = getattr(module, option)
    if isinstance(now, Tensor):
        return lambda value: getattr(module, option).fill_(value)
    kind = round if isinstance(now, int) else float
    return lambda value: setattr(module, option, kind(value))
