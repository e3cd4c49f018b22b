"""What a plan says of a rank against what ranks of real runs hold."""

import gc
import itertools
import json

import pytest
import torch
from jobs import job_of
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import zoo
from zoo.contract import set_auxiliary_scale, set_reduction
from zoo.devices import DEVICES
from zoo.errors import ConfigError
from zoo.plan.plan import kept_bytes, plan
from zoo.plan.propose import propose
from zoo.plan.spread import resolve
from zoo.plan.subject import At, Subject, share
from zoo.predict.roofline import Assumed
from zoo.sections import ParallelSection, TrainSection
from zoo.train.sequence_chunks import backward, cut, new_state

MIXTURE = {
    "dim": 32,
    "vocab_size": 257,
    "tie_embeddings": False,
    "trunk": [
        {"repeat": 2, "of": [{"attention": {"num_heads": 2}}, {"moe": {"num_experts": 4, "top_k": 2}}]},
        [{"gla": {"num_heads": 2}, "residual": {"learn": "channel"}}, {"swiglu": {"hidden_dim": 85}}],
        {"mamba2": {"num_heads": 4}},
    ],
}
TIED = {
    "dim": 24,
    "vocab_size": 257,
    "trunk": [
        [{"gla": {"num_heads": 2}}, {"swiglu": {}, "share": "a"}],
        {"loop": 2, "of": [{"attention": {"num_heads": 2}}], "router": "token_choice"},
        [{"swiglu": {}, "share": "a"}],
    ],
}
SMALL_HYDRA = (
    "dim=64",
    "vocab_size=512",
    "define.facts.product_key.num_keys=16",
    "define.facts.product_key.value_dim=32",
    "define.experts.chunk_moe.hidden_dim=96",
)
H100S, RTX4090S = ((d, Assumed(d, "float32")) for d in (DEVICES["h100"], DEVICES["rtx4090"]))
TRAIN = {"steps": 2, "batch_size": 8, "seq_len": 32, "eval_every": 0, "checkpoint_every": 0}
TASK = {"source": "mqar", "num_pairs": 4}


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def nbytes(tensors):
    return sum(local(t).numel() * local(t).element_size() for t in tensors)


def held_by_a_run(config, layout, recipe):
    """Elements, bytes of gradients and of optimizer state on this rank after two steps."""
    from zoo.train import titan
    from zoo.train.device import process_group, quiet

    document = {"data": TASK, **config, "train": {**TRAIN, **recipe}, "parallel": layout}
    job = job_of(document)
    with process_group(), quiet():
        trainer = titan._config(job).build()
        trainer.train()
        weights = [p for part in trainer.parts for p in part.parameters()]
        states = [t for o in trainer.optimizers for s in o.state.values() for t in s.values()]
        found = (sum(local(p).numel() for p in weights), nbytes(p.grad for p in weights), nbytes(states))
        trainer.close()
    gc.enable()  # torchtitan leaves it off
    set_auxiliary_scale(1.0)
    set_reduction(None)
    return found


def planned(config, layout, recipe, rank, ranks=2):
    train = TrainSection.from_mapping({**TRAIN, **recipe})
    subject = Subject(zoo.build(config, device="meta"), train, train.seq_len)
    spread = resolve(ParallelSection.from_mapping(layout), train, ranks)
    stage = rank if spread.pp > 1 else 0
    at = At(tp=rank if spread.tp > 1 else 0, fsdp=rank if spread.fsdp > 1 else 0)
    units = [u for s in subject.stage_units(spread.pp, spread.stages)[stage :: spread.pp] for u in s]
    held = subject.held(spread.tp, spread.fsdp, spread.ep, at)
    found = [held[u] for u in units]
    first = plan(subject, spread, *H100S).ranks[stage]
    assert first.parameters >= sum(h.elements for h in found)
    if rank == 0 or spread.pp > 1:
        assert first.parameters == sum(h.elements for h in found)
    return sum(h.elements for h in found), sum(h.gradients for h in found), sum(h.optimizer for h in found)


@pytest.mark.parametrize(
    ("config", "layout", "recipe"),
    [
        (MIXTURE, {}, {"optimizer": "muon"}),
        (MIXTURE, {"dp_replicate": 2}, {}),
        (MIXTURE, {"tp": 2}, {"optimizer": "muon"}),
        (MIXTURE, {"pp": 2}, {}),
        (MIXTURE, {"pp": 2, "schedule": "Interleaved1F1B"}, {}),
        (MIXTURE, {"ep": 2}, {}),
        (TIED, {}, {}),
        (TIED, {"tp": 2}, {}),
        (TIED, {"cp": 2}, {}),
    ],
    ids=("fsdp", "hsdp", "tp", "pp", "interleaved", "ep", "tied fsdp", "tied tp", "tied cp"),
)
def test_ranks_hold_what_the_plan_says(workers, config, layout, recipe):
    found = workers(2).run(held_by_a_run, config, layout, recipe, timeout_s=120)
    assert found == [planned(config, layout, recipe, rank) for rank in range(2)]


def test_activations_are_what_autograd_keeps():
    model = zoo.build("hydra_hybrid", SMALL_HYDRA).train()
    train = TrainSection.from_mapping({"batch_size": 2, "seq_len": 256})
    subject = Subject(model, train, train.seq_len)
    spread = resolve(ParallelSection(), train, 1)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    tokens = torch.randint(model.vocab_size, (2, 256))
    with saved_tensors_hooks(pack, lambda t: t):
        hidden = model.hidden(tokens)
    said = sum(kept_bytes(subject, spread, unit) for unit in range(len(subject.units)))
    assert said == pytest.approx(sum(kept.values()), rel=0.1)
    assert hidden.shape == (2, 256, 64)


def subject_of(config, overrides=(), **recipe):
    train = TrainSection.from_mapping(recipe)
    return Subject(zoo.build(config, overrides, device="meta"), train, train.seq_len)


def test_shares_are_rounded_up():
    assert [share(7, 4, i) for i in range(4)] == [2, 2, 2, 1]
    assert [share(5, 4, i) for i in range(4)] == [2, 2, 1, 0]


def test_traffic_of_layouts_that_can_be_counted_by_hand():
    config = {"dim": 32, "vocab_size": 64, "tie_embeddings": False, "trunk": [{"swiglu": {"hidden_dim": 64}}] * 4}
    subject = subject_of(config, batch_size=8, seq_len=16)
    weights, stream = 4 * sum(p.numel() for p in subject.model.parameters()), 4 * 16 * 32

    def sent(**layout):
        made = plan(subject, resolve(ParallelSection.from_mapping(layout), subject.train, 4), *H100S)
        return {m.kind: m.bytes for m in made.ranks[0].moves}

    head = 4 * 64 * 32
    assert sent() == {"gather weights": (2 * weights - head) * 3 // 4, "reduce gradients": weights * 3 // 4}
    assert sent(dp_replicate=4) == {"sum over copies": 2 * weights * 3 // 4}
    # 8 rows; embedding once, each block forward and backward, the head backward; its logits are gathered
    tensor = sent(tp=4)["tensor: sum increments"]
    assert tensor == (2 * (1 + 2 * 4 + 1) * 8 * stream + 4 * 8 * 16 * 64) * 3 // 4
    assert sent(pp=4, microbatches=8)["pipeline: stream"] == 8 * stream


def test_less_is_held_where_more_is_cut_or_recomputed():
    def peak(recipe=None, overrides=(), ranks=64, **layout):
        subject = subject_of("hydra_hybrid", overrides, batch_size=64, seq_len=1024, **(recipe or {}))
        return plan(subject, resolve(ParallelSection.from_mapping(layout), subject.train, ranks), *H100S).ranks[0]

    whole, split, sliced = peak(tp=4, dp_replicate=16), peak(tp=8, dp_replicate=8), peak(cp=2, dp_replicate=16, tp=2)
    assert peak().weights < whole.weights
    assert split.weights < whole.weights
    assert sliced.activations < peak(dp_replicate=16, tp=2, dp_shard=2).activations * 1.6
    full, some = peak({"activation_checkpoint": "full"}), peak({"activation_checkpoint": "budget"})
    products = peak({"activation_checkpoint": "selective"})
    assert full.activations < some.activations < peak().activations
    assert full.activations < products.activations < peak().activations and products.peak < peak().peak
    assert 1.2 * peak().flops < full.flops <= 4 / 3 * peak().flops


def test_a_proposal_fits_and_is_the_quickest():
    subject = subject_of("hydra_hybrid", batch_size=64, seq_len=1024)
    found = propose(subject, 64, *H100S)
    seconds = [p.seconds for p in found.best]
    assert len(found.best) == 5 and seconds == sorted(seconds) and all(p.fits for p in found.best)
    assert all(p.spread.ranks == 64 and p.spread.pp == 1 for p in found.best)  # tied embeddings
    with pytest.raises(ConfigError, match="fits"):
        propose(subject_of("deepseek_v3", batch_size=8, seq_len=512), 8, *RTX4090S)
    with pytest.raises(ConfigError, match="ep"):
        resolve(ParallelSection(ep=3), TrainSection(), 4)


def most_held(step):
    """Bytes that are allocated at once while `step` runs, beyond those before."""
    with torch.autograd.profiler.profile(profile_memory=True) as seen:
        step()
    changes = sorted((e.start_ns(), e.nbytes()) for e in seen.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


CHUNKED = {
    "attention": [[{"attention": {"num_heads": 4, "num_kv_heads": 2}}, "swiglu"]] * 3,
    "states": [["gated_deltanet", "swiglu"], ["mamba2"]],
    "both": [["gated_deltanet", "swiglu"], [{"attention": {"num_heads": 4}}, "swiglu"], ["gated_deltanet", "swiglu"]],
}


@pytest.mark.parametrize("size", [128, 256, 1024])
@pytest.mark.parametrize("trunk", CHUNKED)
def test_memory_of_rows_in_chunks(trunk, size):
    """Against what a backward chunk by chunk allocates at the most."""
    config = {"dim": 128, "vocab_size": 64, "trunk": CHUNKED[trunk]}
    subject = subject_of(config, batch_size=2, seq_len=1024, sequence_chunks={"size": size})
    model, rows = zoo.build(config).train(), torch.randint(64, (2, 1024))

    def run(where, state, wanted):
        if not wanted:
            return model.hidden(rows[:, where], state)
        return F.cross_entropy(model(rows[:, where], state).flatten(0, 1), rows[:, where].flatten(), reduction="sum")

    def step(length=1024):
        chunks = cut(length, size)
        backward(run, new_state(subject.model, 2, length, rows.device), chunks, [True] * len(chunks))

    step(min(size, 256))  # gradients are there, what is loaded once too
    seen = most_held(step)
    rank = plan(subject, resolve(ParallelSection(), subject.train, 1), *H100S).ranks[0]
    assert rank.peak - rank.weights - rank.gradients - rank.optimizer == pytest.approx(seen, rel=0.1)


def test_work_of_rows_in_chunks():
    def flops(**chunks):
        subject = subject_of(CHUNKED_MODEL, batch_size=2, seq_len=64, sequence_chunks=chunks, loss_chunks=1)
        return plan(subject, resolve(ParallelSection(), subject.train, 1), *H100S).ranks[0].flops

    head = 3 * 2 * 2 * 64 * 32 * 16
    layers = flops() - head
    assert flops(size=16) == pytest.approx(layers * (3 + 3 / 4) / 3 + head)  # all but the last forward twice
    assert flops(size=16, keep=0.5) == pytest.approx((layers * (3 + 3 / 4) / 3 + head) / 2 + (layers + head) / 6)


CHUNKED_MODEL = {"dim": 32, "vocab_size": 16, "trunk": [["attention", "swiglu"]]}


@pytest.mark.parametrize("recipe", ["bd3", "fast_dllm", "nbdiff"])
def test_block_diffusion_is_planned_as_two_copies(recipe):
    config = {"dim": 64, "vocab_size": 50, "trunk": [["attention", "swiglu"]] * 2}
    config |= {"diffusion": {"recipe": recipe, "block_size": 16}}
    subject = subject_of(config, batch_size=2, seq_len=256)
    rank = plan(subject, resolve(ParallelSection(), subject.train, 1), *H100S).ranks[0]
    report = zoo.estimate(config, batch_size=2, seq_len=256)
    assert rank.flops == report.flops
    model = zoo.build(config).train()
    tokens = torch.randint(49, (2, 256))
    noise = torch.full(tokens.shape, 0.5) * (torch.rand(tokens.shape) < 0.5)

    def step():
        model.losses(tokens, noise).sum().backward()

    step()
    assert rank.peak - rank.weights - rank.gradients - rank.optimizer == pytest.approx(most_held(step), rel=0.1)


def test_the_command(capsys):
    from zoo.cli import main

    def run(*words):
        with pytest.raises(SystemExit) as done:
            main(["plan", *words])
        return done.value.code, *capsys.readouterr()

    code, out, _ = run("hydra_hybrid", "train.batch_size=64", "--gpus", "64", "--tp", "8")
    assert code == 0
    assert all(word in out for word in ("dp_shard 8, tp 8", "fits", "gather weights", "param_proj stacks", "a step"))
    code, _, err = run("hydra_hybrid", "--gpus", "64", "--tp", "8", "--pp", "2")
    assert code == 2 and "tie_embeddings: false" in err
    code, _, err = run("hydra_small", "--gpu", "H1000")
    assert code == 2 and "unknown" in err
    code, out, _ = run("hydra_small", "--gpus", "2", "--json")
    document = json.loads(out)
    assert code == 0 and document["fits"] and document["proposal"]["best"] and document["layout"]["ranks"] == 2
