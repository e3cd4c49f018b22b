"""Context parallelism: slices of a row on several ranks against the whole row in one process, in double precision."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import zoo
from zoo import registry
from zoo.conformance.subject import Subject, tokens
from zoo.contract import ParallelPlan, positions_from, set_auxiliary_scale
from zoo.errors import ZooError
from zoo.parallel import context
from zoo.row import Slice

LENGTH = 48  # 24 tokens a rank: no multiple of the chunks of 16
BLOCKS = [name for kind in ("mixer", "ffn", "memory") for name in registry.list_blocks(kind)]
POLICIES = [(kind, name) for kind in ("select", "cache") for name in registry.list_blocks(kind)]


def _documents(rows: int, length: int) -> Tensor:
    """Documents that go across the middle, and in every second row one that begins right there."""
    ends = torch.tensor([[length // 5, length // 3 + length // 2, length], [3, length // 2, length]])
    ids = [torch.searchsorted(ends[r % 2], torch.arange(length), right=True) for r in range(rows)]
    return 7 - torch.stack(ids)  # ids need not grow


def _difference(mine: Tensor, whole: Tensor) -> float:
    return (mine - whole).abs().max().item() / max(1.0, whole.abs().max().item())


def _gradients(whole: torch.nn.Module, sliced: torch.nn.Module) -> dict[str, float]:
    """How far the gradients of the slices, summed over ranks, are from those of the whole, by name."""
    found = {}
    for (name, p), q in zip(whole.named_parameters(), sliced.parameters(), strict=True):
        total = torch.zeros_like(q) if q.grad is None else q.grad.clone()
        dist.all_reduce(total)
        found[name] = _difference(total, torch.zeros_like(p) if p.grad is None else p.grad)
    return found


def _check(answers: list[dict[str, float]], bound: float = 1e-9) -> None:
    wrong = {f"{key} on rank {r}": d for r, found in enumerate(answers) for key, d in found.items() if not d <= bound}
    assert not wrong, wrong


# ------------------------------------------------------------------------------------------------ blocks
def _run(block: Any, x: Tensor, doc_ids: Tensor | None, positions: Tensor | None, weight: Tensor):
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = block(x, positions=positions, doc_ids=doc_ids)
    (y * weight).sum().backward()
    return y.detach(), x.grad


def _block(name: str, options: dict, packed: bool, length: int = LENGTH) -> dict[str, float]:
    """Largest difference of outputs and gradients, by name."""
    part = Slice(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    whole = Subject(name, registry.load(name).zoo_registration, options).build().train()
    sliced = copy.deepcopy(whole)
    context.cut(sliced, part)
    x, weight = tokens(2, length), tokens(2, length, seed=1)
    doc_ids = _documents(2, length) if packed else None
    positions = positions_from(doc_ids, 2, length, x.device)
    set_auxiliary_scale(1.0)
    y, dx = _run(whole, x, doc_ids, positions if packed else None, weight)
    set_auxiliary_scale(1.0 / part.size)
    own = None if doc_ids is None else part.own(doc_ids)
    mine, mine_dx = _run(sliced, part.own(x), own, part.own(positions), part.own(weight))
    found = {"output": _difference(mine, part.own(y)), "input": _difference(mine_dx, part.own(dx))}
    return found | _gradients(whole, sliced)


def _examples(name: str) -> list[tuple[dict, bool]]:
    """Options and whether the row holds documents: more of them where the block itself does the exchange."""
    examples = [dict(e) for e in (registry.block_card(name).examples or ({},))]
    plan = registry.create(name, 64, **examples[0], device="meta").parallel_plan()
    if plan.context in ("token", "gather_input"):
        return [(examples[0], True)]
    return [(examples[0], False), *((e, True) for e in examples[:2])]


@pytest.mark.parametrize("name", BLOCKS)
def test_slices_of_a_block_are_the_block(workers, name):
    for options, packed in _examples(name):
        _check(workers(2).run(_block, name, options, packed))


@pytest.mark.parametrize(("kind", "name"), POLICIES)
def test_slices_of_attention_with_a_policy(workers, kind, name):
    options = dict((registry.block_card(name).examples or ({},))[0])
    _check(workers(2).run(_block, "attention", {"num_heads": 4, "num_kv_heads": 2, kind: {name: options}}, True))


def _several(cases: list[tuple[str, dict, bool]], length: int) -> dict[str, float]:
    found = {}
    for name, options, packed in cases:
        found |= {f"{name}.{key}": d for key, d in _block(name, options, packed, length).items()}
    return found


def test_states_go_through_four_slices(workers):
    """A slice of 2 tokens is shorter than the taps of a convolution, which then come from two slices."""
    names = ("attention", "gla", "retention", "gated_deltanet", "mamba", "s4d", "mlstm", "plstm", "rwkv7", "mamba3")
    cases = [(n, dict(registry.block_card(n).examples[0]), packed) for n in names for packed in (False, True)]
    cases += [("attention", {**HEADS, "window": window}, packed) for window in (1, 4, 6) for packed in (False, True)]
    _check(workers(4).run(_several, cases, 8))


def _uncut(name: str) -> float:
    """What `_block` would find where nothing is exchanged."""
    part, block = Slice(None, dist.get_rank(), dist.get_world_size()), registry.create(name, 64, dtype=torch.float64)
    x = tokens(2, LENGTH)
    return _difference(block(part.own(x)).detach(), part.own(block(x)).detach())


@pytest.mark.parametrize("name", ["attention", "gla", "deltanet", "mamba", "rg_lru", "moba"])
def test_the_comparison_can_fail(workers, name):
    assert workers(2).run(_uncut, name)[1] > 1e-3


# ------------------------------------------------------------------------------------------- whole models
def _config(*trunk: Any) -> dict:
    return {"architecture": "causal_lm", "dim": 64, "vocab_size": 97, "trunk": list(trunk)}


SMALL = {"chunk_size": 16}
HEADS = {"num_heads": 4, "num_kv_heads": 2}
MODELS = {
    "llama": _config({"repeat": 2, "of": [{"attention": HEADS}, "swiglu"]}),
    "mamba2": _config({"repeat": 2, "of": [{"mamba2": {"head_dim": 16, "state_dim": 16, **SMALL}}]}),
    "deltanet": _config([{"gated_deltanet": SMALL}, "swiglu", {"attention": {**HEADS, "window": 12}}, "swiglu"]),
    "experts": _config([{"attention": HEADS}, {"moe": {"num_experts": 4, "top_k": 2}}]),
    "mor": _config(
        {"loop": {"steps": 2, "router": {"expert_choice": {"capacity": [1.0, 0.5]}}}, "of": ["attention", "mlp"]}
    ),
    "loops": _config(
        {"loop": {"steps": 3, "kv": "first", "step_signal": "coordinate"}, "of": [{"attention": HEADS}, "mlp"]},
        {"loop": {"steps": 2, "router": "act"}, "of": [{"gla": SMALL}, "swiglu"]},
        {"loop": {"steps": 4, "inject": "add", "start": "noise", "ring": 2, "grad_last": 2}, "of": ["lru", "mlp"]},
    ),
    "branches": _config(
        {"route": {"router": "mod"}, "of": ["attention", "swiglu"]},
        {"parallel": [{"retention": SMALL}, "mlp"], "norm": "rms", "merge": "gated"},
        {"stage": {"steps": 2}, "of": [{"mlstm": SMALL}, "mlp"]},
        {"feedback": {"inner": 1, "outer": 2}, "of": ["rg_lru", "mlp"]},
        {"revisit": {"at": "0", "hidden_dim": 32}, "of": [["mamba", "mlp"]]},
        {"value_residual": [["rwkv7", "rwkv7_ffn"], ["rwkv7", "rwkv7_ffn"]]},
        {"stitch": 32, "of": [["attention", "mlp"], "gla"]},
    ),
}


def _step(model: Any, text: Tensor, doc_ids: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    logits = model(text, doc_ids=doc_ids)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    return logits.detach(), loss.detach()


def _model(config: Any, length: int, packed: bool, train: bool = True, compiled: bool = False) -> dict[str, float]:
    part = Slice(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    whole = zoo.build(config, dtype=torch.float64).train(train)
    torch.manual_seed(0)
    with torch.no_grad():  # what starts at zero would hide what is behind it
        for p in whole.parameters():
            p.add_(0.02 * torch.randn_like(p))
    sliced = copy.deepcopy(whole)
    context.apply(sliced, part.group)
    if compiled:
        for layer in sliced.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
            layer.compile(backend="aot_eager")
    text = torch.randint(97, (2, length))
    doc_ids, targets = _documents(2, length) if packed else None, text.roll(-1, 1)
    set_auxiliary_scale(1.0)
    logits, loss = _step(whole, text, doc_ids, targets)
    set_auxiliary_scale(1.0 / part.size)
    own = None if doc_ids is None else part.own(doc_ids)
    mine, my_loss = _step(sliced, part.own(text), own, part.own(targets))
    dist.all_reduce(my_loss)
    found = {"logits": _difference(mine, part.own(logits)), "loss": _difference(my_loss, loss)}
    return found | _gradients(whole, sliced)


@pytest.mark.parametrize("packed", [False, True], ids=["row", "documents"])
@pytest.mark.parametrize("name", MODELS)
def test_slices_of_a_model_are_the_model(workers, name, packed):
    _check(workers(2).run(_model, MODELS[name], LENGTH, packed))


@pytest.mark.parametrize("name", MODELS)
def test_slices_of_a_model_that_is_evaluated(workers, name):
    _check(workers(2).run(_model, MODELS[name], LENGTH, True, False))


@pytest.mark.parametrize("name", ["hydra_small", "gla_small"])
def test_shipped_models(workers, name):
    _check(workers(2).run(_model, name, 160, True))


def test_tokens_that_leave_early_are_picked_from_the_whole_row(workers):
    config = _config(
        {"loop": {"steps": 4, "ring": 2, "router": {"exit": {"threshold": 0.5}}}, "of": ["attention", "mlp"]}
    )
    _check(workers(2).run(_model, config, 16, True, False))


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_slices_of_compiled_and_recomputed_layers(workers, name):
    _check(workers(2).run(_model, MODELS[name], LENGTH, True, True, True))


# ------------------------------------------------------------------------------------- told before a launch
class _Alone(registry.load("swiglu")):
    def parallel_plan(self) -> ParallelPlan:
        return ParallelPlan(context="none", reason="it keeps a secret")


def test_what_cannot_run_is_refused_with_reason_and_alternatives():
    model = zoo.build(MODELS["llama"], device="meta")
    assert context.refusals(model, 2) == []
    model.layers[1].items[1].block.__class__ = _Alone
    (refusal,) = context.refusals(model, 2)
    assert refusal.where == "parallel.cp"
    assert refusal.message.startswith("layers.1.items.1.block: swiglu: it keeps a secret; use another block")
    assert context.refusals(model, 1) == []


@pytest.mark.parametrize("config", ["bd3_small", "vit_small"])
def test_models_that_read_no_rows_are_refused(config):
    (refusal,) = context.refusals(zoo.build(config, device="meta"), 2)
    assert "rows of text" in refusal.message


def _streams() -> str:
    model = zoo.build(MODELS["llama"])
    context.apply(model, dist.group.WORLD)
    try:
        model(torch.zeros(1, 4, dtype=torch.long), state=model.init_state(1, 4))
    except ZooError as error:
        return str(error)
    return ""


def test_streaming_of_a_slice_is_refused(workers):
    assert all("without a state" in said for said in workers(2).run(_streams))


def test_every_exchange_is_told():
    kinds = {"token": ("nothing", "loss"), "gather_kv": ("kv",), "pass_state": ("state",), "halo": ("halo",)}
    for name in BLOCKS:
        example = dict((registry.block_card(name).examples or ({},))[0])
        block = registry.create(name, 64, **example, device="meta")
        said = context.exchange(block)
        assert said.kind in kinds.get(block.parallel_plan().context, ("input",)), name
        assert (said.bytes_per_token + said.bytes_per_row > 0) == (said.kind != "nothing"), name


def test_bytes_of_an_exchange():
    def of(name: str, **options) -> context.Exchange:
        return context.exchange(registry.create(name, 64, **options, device="meta"))

    assert of("attention", **HEADS) == context.Exchange("kv", 2 * 2 * 16 * 4)
    assert of("mla", num_heads=4, kv_lora_rank=16, qk_rope_head_dim=8) == context.Exchange("kv", (16 + 8) * 4)
    # state and decay of 4 heads of 8 by 16
    assert of("gla") == context.Exchange("state", 0, 4 * (8 * 16 + 8) * 4)
    assert of("attention", **HEADS, window=9) == context.Exchange("kv", 0, 8 * 2 * 2 * 16 * 4)
    assert of("nsa") == context.Exchange("input", 64 * 4)
    told = [(path, name, said.kind) for path, name, said in context.exchanges(zoo.build(MODELS["mor"], device="meta"))]
    assert told == [("layers.0", "loop", "input")]
