"""Distillation of a recurrent student: the two stages by their definition, a run that lowers the loss, errors."""

import os
import signal

import pytest
import torch

import zoo
from zoo.errors import ConfigError, DataError
from zoo.sections import DistillSection, TrainSection
from zoo.train import curve
from zoo.train.distill import objective_of

ATTENTION = {"attention": {"num_heads": 2, "causal": False, "rope": False, "bias": True}}
TEACHER = {
    "name": "teacher", "architecture": "vision", "dim": 16, "norm": "layer",
    "vision": {"image_size": 16, "patch_size": 8, "num_registers": 2, "num_classes": 8},
    "trunk": [{"repeat": 5, "of": [ATTENTION, {"mlp": {"hidden_dim": 24, "bias": True}}]}],
    "data": {"source": "shapes"},
}  # fmt: skip
STUDENT = [ATTENTION, {"swiglu": {"hidden_dim": 32, "bias": True}}]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A saved model with weights of order one."""
    model = zoo.build(TEACHER)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.layers.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    return folder


def config(teacher, sizes=(2, 3), **top):
    firsts = [1 + sum(sizes[:i]) for i in range(len(sizes))]
    trunk = [{"stage": n, "first": first, "of": STUDENT} for n, first in zip(sizes, firsts, strict=True)]
    train = {"steps": 8, "batch_size": 8, "lr": 0.01, "warmup_steps": 1, "eval_every": 4, "eval_batches": 1,
             "checkpoint_every": 3}  # fmt: skip
    return TEACHER | {"name": "student", "trunk": trunk, "distill": {"teacher": str(teacher)}, "train": train,
                      "residual": {"scale": 0.5, "learn": "channel"}} | top  # fmt: skip


def distillation(document, steps=40, **train):
    section = DistillSection.from_mapping(document["distill"])
    return objective_of(section, TrainSection(steps=steps, **train), document)


def images(rows=3):
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def apart(a, b, weights):
    """Weighted mean of squares [B] over class token, registers and patches."""
    square = (a - b).square().mean(-1)
    parts = square[:, :1].mean(1), square[:, 1:3].mean(1), square[:, 3:].mean(1)
    return sum(w * p for w, p in zip(weights, parts, strict=True))


# ----------------------------------------------------------------------------------------------- objective
def test_tau_falls_in_the_first_quarter_of_the_first_stage(teacher):
    made = distillation(config(teacher))
    taus = [made.forced(step) for step in range(1, 41)]
    assert taus[:6] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0]) and set(taus[5:20]) == {0.0}
    assert taus[20:] == [None] * 20
    assert made.told(3) == {"stage": 1, "teacher_forced": pytest.approx(0.6)} and made.told(21) == {"stage": 2}


def test_both_stages_by_their_definition(teacher):
    document = config(teacher)
    made, student, x = distillation(document), zoo.build(document), images()
    t = zoo.from_pretrained(teacher).trajectory(x)
    a, b = student.layers
    tokens = t[0].shape[1]
    even = (1 / tokens, 2 / tokens, (tokens - 3) / tokens)
    forced = sum(apart(a.step(t[i], i), t[i + 1], even) for i in range(2)) / 2
    forced = forced + sum(apart(b.step(t[2 + i], i), t[3 + i], (0.34, 0.33, 0.33)) for i in range(3)) / 3
    torch.testing.assert_close(made(student, x, torch.zeros(3), 1), forced)
    a1 = a.step(t[0], 0)
    rolled = (apart(a1, t[1], even) + apart(a.step(a1, 1), t[2], even)) / 2
    made_, total = t[2], 0
    for i in range(3):
        made_ = b.step(made_, i)
        total = total + apart(made_, t[3 + i], (0.34, 0.33, 0.33)) / 3
    rolled = rolled + total
    torch.testing.assert_close(made(student, x, torch.zeros(3), 20), rolled)
    torch.testing.assert_close(made(student, x, torch.zeros(3), 3), 0.6 * forced + 0.4 * rolled)
    second, stream = 0, t[0]
    for i in range(5):
        stream = a.step(stream, i) if i < 2 else b.step(stream, i - 2)
        second = second + apart(stream, t[i + 1], (0.45, 0.10, 0.45)) / 5
    torch.testing.assert_close(made(student, x, torch.zeros(3), 21), second)


def test_a_rollout_of_one_layer_is_teacher_forced(teacher):
    document = config(teacher, sizes=(1, 1, 1, 1, 1))
    made, student, x = distillation(document), zoo.build(document), images()
    forced, rolled = (made(student, x, torch.zeros(3), step) for step in (1, 20))
    torch.testing.assert_close(forced, rolled)


def test_nodes_of_the_first_stage_do_not_meet(teacher):
    document = config(teacher)
    made, student, x = distillation(document), made_student(document), images()
    for step in (1, 20):
        grads = []
        for _ in range(2):
            student.zero_grad()
            made(student, x, torch.zeros(3), step).sum().backward()
            grads.append([p.grad.clone() for p in student.layers[1].parameters()])
            with torch.no_grad():
                for p in student.layers[0].parameters():
                    p.add_(0.1)
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def made_student(document):
    return distillation(document).build(document, device="cpu").train()


def test_the_teacher_as_its_own_student_has_nothing_to_learn(teacher):
    document = config(teacher, trunk=TEACHER["trunk"], residual="pre")
    made, student = distillation(document), zoo.from_pretrained(teacher)
    for step in (1, 3, 20, 21):
        assert made(student, images(), torch.zeros(3), step).max() < 1e-10  # the fast kernel rounds otherwise


def test_without_registers_their_weight_goes_to_the_others(teacher, tmp_path):
    vision = TEACHER["vision"] | {"num_registers": 0}
    zoo.build(TEACHER | {"vision": vision}).save_pretrained(tmp_path)
    document = config(tmp_path, vision=vision)
    made, student, x = distillation(document), zoo.build(document), images()
    made.prepare(student)
    a, b = student.trajectory(x), made.teacher.trajectory(x)
    square = [(s - t).square().mean(-1) for s, t in zip(a[1:], b[1:], strict=True)]
    expected = sum((s[:, 0] + s[:, 1:].mean(1)) / 2 for s in square) / 5
    torch.testing.assert_close(made(student, x, torch.zeros(3), 40), expected)


# ------------------------------------------------------------------------------------------------- answers
def labelled(teacher, **vision):
    vision = {"image_size": 16, "patch_size": 4, "num_classes": 8, "distill_token": True} | vision
    distill = {"teacher": str(teacher), "targets": "labels"}
    return config(teacher, dim=32, vision=vision, trunk=[STUDENT], distill=distill)


def test_hard_distillation_by_its_definition(teacher):
    document, x, labels = labelled(teacher), images(), torch.tensor([[1], [5], [2]])
    made, student = distillation(document), made_student(labelled(teacher))
    said = zoo.from_pretrained(teacher)(x).argmax(-1)
    given, taught = (logits.log_softmax(-1) for logits in student.answers(x))
    expected = -(given.gather(1, labels)[:, 0] + taught.gather(1, said[:, None])[:, 0]) / 2
    torch.testing.assert_close(made(student, x, labels, 1), expected)
    assert made.told(1) == {} and all(p.requires_grad for p in student.parameters())


def test_the_distillation_head_learns_the_answers_of_the_teacher(teacher):
    pytest.importorskip("torchtitan")
    from zoo.train.run import train

    document = labelled(teacher)
    document["train"] |= {"steps": 30, "batch_size": 16, "compile": False, "eval_every": 0}
    result = train(document, progress=False)
    assert set(result.evaluation) == {
        "loss", "accuracy", "distill_loss", "agreement_with_teacher", "teacher_accuracy", "scored_images",
    }  # fmt: skip
    made = distillation(document)
    x = images(64)
    with torch.no_grad():
        said = made.teacher(x).argmax(-1)
        losses = [torch.nn.functional.cross_entropy(m.answers(x)[1], said) for m in (zoo.build(document), result.model)]
    assert losses[1] < 0.8 * losses[0]
    assert result.sample.count("wanted: ") == 16


# ------------------------------------------------------------------------------------------------ training
def test_training_lowers_the_loss_and_keeps_what_is_the_teachers(teacher, tmp_path):
    pytest.importorskip("torchtitan")

    from zoo.train.run import train

    document = config(teacher)
    whole = train(document, out=tmp_path / "whole", steps=24, progress=False)
    records = curve.read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [r["stage"] for r in records] == [1] * 12 + [2] * 12
    # the same loss, of the whole student, before and after
    made, untrained = distillation(document), zoo.build(document)
    made.prepare(untrained)
    with torch.no_grad():
        before = float(made(untrained, images(32), torch.zeros(32), 40).mean())
        after = float(made(whole.model, images(32), torch.zeros(32), 40).mean())
    assert after < 0.7 * before
    assert records[-1]["loss"] < records[12]["loss"] and records[11]["loss"] < records[4]["loss"]
    for name, p in zoo.from_pretrained(teacher).state_dict().items():
        if not name.startswith("layers."):
            assert torch.equal(whole.model.state_dict()[name], p), name
    assert set(whole.evaluation) == {
        "loss", "accuracy", "distill_loss", "last_layer_cosine", "teacher_accuracy", "scored_images",
    }  # fmt: skip
    assert whole.evaluation["distill_loss"] == pytest.approx(records[-1]["heldout_loss"], rel=0.5)


def test_resumes_exactly_and_does_not_depend_on_pieces(teacher, tmp_path):
    pytest.importorskip("torchtitan")
    from zoo.train.run import train

    headless = TEACHER["vision"] | {"num_classes": 0}
    zoo.build(TEACHER | {"vision": headless}).save_pretrained(tmp_path / "headless")
    document = config(tmp_path / "headless", vision=headless)
    document["train"] |= {"schedule": "wsd", "eval_every": 0}
    whole = train(document, out=tmp_path / "whole", progress=False)
    assert set(whole.evaluation) == {"distill_loss", "last_layer_cosine", "scored_images"}
    assert whole.sample.count("cosine with the teacher's") == 5
    add = curve.MetricsFile.add

    def interrupt(self, record):
        add(self, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curve.MetricsFile, "add", interrupt)
        cut = train(document, out=tmp_path / "cut", progress=False)
    assert cut.interrupted and cut.step == 3
    resumed = train(document, out=tmp_path / "cut", resume=True, progress=False)
    assert resumed.loss == pytest.approx(whole.loss, rel=1e-6)
    document["train"] |= {"accumulation": 4}
    assert train(document, progress=False).loss == pytest.approx(whole.loss, rel=1e-4)
    zoo.build(TEACHER | {"vision": headless}, seed=1).save_pretrained(tmp_path / "headless")
    document["train"] |= {"accumulation": 1}
    with pytest.raises(DataError, match="cannot be resumed: the data are not those"):
        train(document, out=tmp_path / "cut", resume=True, progress=False)


# -------------------------------------------------------------------------------------------------- errors
def complaints(document, **train):
    with pytest.raises(ConfigError) as error:
        distillation(document, **train)
    return [str(p).removeprefix("config ") for p in error.value.problems]


def test_errors(teacher, tmp_path):
    one = complaints(config(tmp_path))
    assert len(one) == 1 and one[0].startswith("distill.teacher: cannot be read") and "finished run" in one[0]
    (said,) = complaints(config(teacher, sizes=(2, 2)))
    assert said == f"trunk: has 4 layers, the teacher has 5 (distill.teacher {teacher})"
    assert complaints(config(teacher, dim=32))[0].startswith("dim: is 32, the teacher's is 16")
    vision = TEACHER["vision"] | {"pool": "mean"}
    assert "vision.pool: is mean" in complaints(config(teacher, vision=vision))[0]
    assert "final_norm: is RMSNorm" in complaints(config(teacher, final_norm="rms"))[0]
    assert "train.compile: does not reach" in complaints(config(teacher), compile=True)[0]
    zoo.build("gla_small", ["dim=32", "trunk[0].repeat=1"]).save_pretrained(tmp_path / "text")
    assert "holds no vision model" in complaints(config(tmp_path / "text"))[0]
    said = complaints(labelled(teacher, distill_token=False, num_classes=9, channels=1))
    assert [s.split(":")[0] for s in said] == ["vision.distill_token", "vision.num_classes", "vision.channels"]
    assert "no multiple of the teacher's patches of 8" in complaints(labelled(teacher, image_size=12))[0]


def test_errors_of_the_section():
    with pytest.raises(ConfigError, match=r"distill\.teacher: must name the run folder"):
        zoo.build(config("x") | {"distill": {}}, device="meta")
    with pytest.raises(ConfigError, match="first_stage: must be at most 1"):
        zoo.build(config("x") | {"distill": {"teacher": "x", "first_stage": 1.5}}, device="meta")
    with pytest.raises(ConfigError, match="first_stage: goes with targets: layers"):
        zoo.build(config("x") | {"distill": {"teacher": "x", "targets": "labels", "first_stage": 0.2}}, device="meta")
    text = {"dim": 32, "vocab_size": 9, "trunk": ["swiglu"], "distill": {"teacher": "x"}}
    with pytest.raises(ConfigError, match="distill: goes with architecture: vision, this is causal_lm"):
        zoo.build(text, device="meta")


def test_nothing_can_be_learnt_without_classes_or_a_teacher():
    pytest.importorskip("torchtitan")
    from zoo.train.run import train

    with pytest.raises(ConfigError, match="num_classes: is 0: nothing can be learnt but from a teacher"):
        train(TEACHER | {"vision": {"image_size": 16, "patch_size": 8}}, progress=False)
