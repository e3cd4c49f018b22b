"""A vision model learns from a trained one: layer by layer (Raptor, 2512.19941), or its answers (DeiT, 2012.12877).

Layers. Those of the student are the ones that its stream goes through: each step of a stage is one, and each follows
the teacher's layer of the same number. A loss is the mean over layers of the squared distance to the teacher's stream,
with weights for class token, registers and patches.
1. Every node of the trunk alone, on its layers s .. e: tau * (layer l from the teacher's layer l - 1)
   + (1 - tau) * (from the teacher's layer s - 1 on, fed with its own outputs); tau falls from 1 to 0.
2. All nodes together from the embedding on, fed with their own outputs.

Labels. Half the cross-entropy of the head with the label, half that of the distillation head with the class that the
teacher finds most likely.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.architectures.vision import VisionModel
from zoo.errors import ConfigError, Problem
from zoo.graph.stage import layers_of
from zoo.sections import DistillSection, TrainSection
from zoo.train.evaluate import evaluating
from zoo.train.loader import Rows, batch

Weights = tuple[float, float, float]  # of class token (with the distillation token), registers and patches
LAST_NODE: Weights = (0.34, 0.33, 0.33)  # in the first stage; in the nodes before it all tokens weigh the same
ROLLOUT: Weights = (0.45, 0.10, 0.45)
FORCED_SHARE = 0.25  # of the first stage: so long tau falls
KEPT = ("embed", "norm", "head", "distill_head")  # the teacher's, frozen, where layers are learnt


class Distillation:
    """The objective of a student: call it with (student, images, labels, step) for losses [B]; steps count from 1."""

    def __init__(self, section: DistillSection, train: TrainSection, document: Mapping[str, Any]):
        self.teacher = _teacher(section.teacher)
        problems = list(self.misfits(zoo.build(document, device="meta"), train))
        if problems:
            raise ConfigError([Problem(f"{text} (distill.teacher {section.teacher})", at) for at, text in problems])

    def misfits(self, student: VisionModel, train: TrainSection) -> Iterator[tuple[str, str]]:
        """(where, why) of everything that keeps the student from following its teacher."""
        raise NotImplementedError

    def build(self, document: Mapping[str, Any], *, device: str) -> Any:
        """A student."""
        return zoo.build(document, device=device)

    def prepare(self, student: nn.Module) -> None:
        """Give a drawn student what it keeps of its teacher."""

    def told(self, step: int) -> dict[str, float]:
        """What the record of a step says of it."""
        return {}

    def __call__(self, student: Any, images: Tensor, labels: Tensor, step: int) -> Tensor:
        raise NotImplementedError

    def figures(self, student: Any, rows: Rows, count: int, size: int) -> dict[str, float]:
        """`distill_loss` and what else tells how near the student is, over the first `count` rows."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of the teacher's weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.teacher.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class LayerDistillation(Distillation):
    """The two stages of Raptor."""

    def __init__(self, section: DistillSection, train: TrainSection, document: Mapping[str, Any]):
        super().__init__(section, train, document)
        self.first_stage = round(section.first_stage * train.steps)

    def misfits(self, student: VisionModel, train: TrainSection) -> Iterator[tuple[str, str]]:
        teacher = self.teacher
        if student.dim != teacher.dim:
            yield "dim", f"is {student.dim}, the teacher's is {teacher.dim}"
        for option, given in vars(student.options).items():
            if given != (theirs := getattr(teacher.options, option)):
                yield f"vision.{option}", f"is {given}, the teacher's is {theirs}"
        if repr(student.norm) != repr(teacher.norm):
            yield "final_norm", f"is {student.norm}, the teacher's is {teacher.norm}"
        have, need = (sum(len(layers_of(node)) for node in model.layers) for model in (student, teacher))
        if have != need:
            yield "trunk", f"has {have} layers, the teacher has {need}"
        for option, off in (("compile", False), ("activation_checkpoint", "none")):
            if getattr(train, option) != off:
                yield f"train.{option}", "does not reach the single layers that are learnt here"

    def build(self, document: Mapping[str, Any], *, device: str) -> Any:
        student = super().build(document, device=device)
        for part in _kept(student).values():
            part.requires_grad_(False)
        return student

    @torch.no_grad()
    def prepare(self, student: nn.Module) -> None:
        for name, part in _kept(student).items():
            part.load_state_dict(getattr(self.teacher, name).state_dict())

    def forced(self, step: int) -> float | None:
        """tau at a step; None in the second stage."""
        if step > self.first_stage:
            return None
        return max(0.0, 1 - (step - 1) / max(1, round(FORCED_SHARE * self.first_stage)))

    def told(self, step: int) -> dict[str, float]:
        tau = self.forced(step)
        return {"stage": 2} if tau is None else {"stage": 1, "teacher_forced": tau}

    def __call__(self, student: Any, images: Tensor, labels: Tensor, step: int) -> Tensor:
        wanted, tau = self._trajectory(images), self.forced(step)
        if tau is None:
            layers = [layer for some, _ in _nodes(student, wanted) for layer in some]
            return self._distance(_unrolled(layers, wanted[0]), wanted[1:], ROLLOUT)
        loss: Any = 0.0
        nodes = list(_nodes(student, wanted))
        for i, (layers, stream) in enumerate(nodes):
            weights = LAST_NODE if i == len(nodes) - 1 else None
            if tau > 0:
                made = [layer(x) for layer, x in zip(layers, stream[:-1], strict=True)]
                loss = loss + tau * self._distance(made, stream[1:], weights)
            if tau < 1:
                loss = loss + (1 - tau) * self._distance(_unrolled(layers, stream[0]), stream[1:], weights)
        return loss

    def figures(self, student: Any, rows: Rows, count: int, size: int) -> dict[str, float]:
        loss = cosine = 0.0
        with evaluating(student):
            for images, _ in _batches(student, rows, count, size):
                wanted, made = self._trajectory(images)[1:], student.trajectory(images)[1:]
                loss += float(self._distance(made, wanted, ROLLOUT).sum())
                cosine += float(F.cosine_similarity(made[-1], wanted[-1], dim=-1).mean(1).sum())
        return {"distill_loss": loss / count, "last_layer_cosine": cosine / count}

    def sample(self, student: Any, rows: Rows, count: int) -> str:
        """Of each layer, the mean cosine of the student's and the teacher's tokens."""
        with evaluating(student):
            images = batch(rows, 0, count).inputs
            pairs = zip(student.trajectory(images)[1:], self._trajectory(images)[1:], strict=True)
            cosines = [float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]
        return "".join(f"layer {i}: cosine with the teacher's {c:.4f}\n" for i, c in enumerate(cosines, 1))

    @torch.no_grad()
    def _trajectory(self, images: Tensor) -> list[Tensor]:
        return self.teacher.to(images.device).trajectory(images)

    def _distance(self, made: Sequence[Tensor], wanted: Sequence[Tensor], weights: Weights | None) -> Tensor:
        o = self.teacher.options
        square = torch.stack([(a - b).square().mean(-1) for a, b in zip(made, wanted, strict=True)]).mean(0)  # [B, T]
        if weights is None:
            return square.mean(1)
        sizes = [o.num_prefix - o.num_registers, o.num_registers, square.shape[1] - o.num_prefix]
        groups = zip(weights, square.split(sizes, 1), strict=True)
        present = [(weight, group.mean(1)) for weight, group in groups if group.shape[1]]
        return torch.stack([w * g for w, g in present]).sum(0) / sum(w for w, _ in present)


class LabelDistillation(Distillation):
    """Hard distillation of DeiT."""

    def misfits(self, student: VisionModel, train: TrainSection) -> Iterator[tuple[str, str]]:
        mine, theirs = student.options, self.teacher.options
        if not mine.distill_token:
            yield "vision.distill_token", "must be true: its head learns what the teacher answers"
        for option in ("num_classes", "channels"):
            a, b = getattr(mine, option), getattr(theirs, option)
            if a != b:
                yield f"vision.{option}", f"is {a}, the teacher's is {b}"
        if mine.image_size % theirs.patch_size:
            yield (
                "vision.image_size",
                f"is {mine.image_size}, no multiple of the teacher's patches of {theirs.patch_size}",
            )

    def __call__(self, student: Any, images: Tensor, labels: Tensor, step: int) -> Tensor:
        logits, distilled = student.answers(images)
        given = F.cross_entropy(logits.float(), labels.flatten(), reduction="none")
        return (given + F.cross_entropy(distilled.float(), self._said(images), reduction="none")) / 2

    def figures(self, student: Any, rows: Rows, count: int, size: int) -> dict[str, float]:
        loss = same = 0.0
        with evaluating(student):
            for images, labels in _batches(student, rows, count, size):
                loss += float(self(student, images, labels, 0).sum())
                same += float((student(images).argmax(-1) == self._said(images)).sum())
        return {"distill_loss": loss / count, "agreement_with_teacher": same / count}

    @torch.no_grad()
    def _said(self, images: Tensor) -> Tensor:
        return self.teacher.to(images.device)(images).argmax(-1)


def objective_of(section: DistillSection, train: TrainSection, document: Mapping[str, Any]) -> Distillation:
    """The objective that a section asks for. ConfigError where teacher and student do not fit."""
    made = LayerDistillation if section.targets == "layers" else LabelDistillation
    return made(section, train, document)


def _kept(student: nn.Module) -> dict[str, nn.Module]:
    parts = {name: getattr(student, name) for name in KEPT}
    return {name: part for name, part in parts.items() if part is not None}


def _nodes(student: Any, wanted: Sequence[Tensor]) -> Iterator[tuple[list[Callable], Sequence[Tensor]]]:
    """Of each node of the trunk: its layers, and the teacher's stream before and after each of them."""
    first = 0
    for node in student.layers:
        layers = layers_of(node)
        yield layers, wanted[first : first + len(layers) + 1]
        first += len(layers)


def _unrolled(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    made = []
    for layer in layers:
        x = layer(x)
        made.append(x)
    return made


def _batches(student: nn.Module, rows: Rows, count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of the first `count` rows, on the student's device."""
    device = next(student.parameters()).device
    for first in range(0, count, size):
        part = batch(rows, first, min(size, count - first))
        yield part.inputs.to(device), part.labels.to(device)


def _teacher(folder: str) -> VisionModel:
    try:
        teacher = zoo.from_pretrained(folder)
    except ConfigError as error:
        raise ConfigError([Problem(f"cannot be read: {error.problems[0]}", "distill.teacher")]) from None
    if not isinstance(teacher, VisionModel):
        raise ConfigError([Problem(f"{folder} holds no vision model", "distill.teacher")])
    return teacher.requires_grad_(False)
