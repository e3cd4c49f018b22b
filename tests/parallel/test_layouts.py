"""Whole models on two ranks: the same losses as on one, and refusals before anything starts."""

import pytest
import torch
from jobs import job_of

import zoo
from zoo.errors import ConfigError
from zoo.parallel import pipeline
from zoo.parallel.layout import check, pieces
from zoo.sections import ParallelSection, TrainSection

MIXTURE = {
    "dim": 32,
    "vocab_size": 257,
    "tie_embeddings": False,
    "trunk": [{"repeat": 2, "of": [{"attention": {"num_heads": 2}}, {"moe": {"num_experts": 4, "top_k": 2}}]}],
}
DEEP = {"dim": 32, "vocab_size": 257, "tie_embeddings": False, "trunk": [{"repeat": 4, "of": ["gla"]}]}
HYBRID = {
    "dim": 32,
    "vocab_size": 257,
    "trunk": [
        [{"gla": {"num_heads": 2}}, {"swiglu": {}, "residual": {"learn": "scalar"}}],
        {"loop": 2, "of": [{"attention": {"num_heads": 2}}], "router": "token_choice"},
    ],
}
VISION = {
    "architecture": "vision",
    "dim": 32,
    "vision": {"image_size": 16, "patch_size": 4, "num_classes": 8},
    "trunk": [{"repeat": 2, "of": [{"attention": {"num_heads": 2, "causal": False, "rope": False}}, "mlp"]}],
    "data": {"source": "shapes"},
}
CHUNKS = {
    "dim": 32,
    "vocab_size": 257,
    "tie_embeddings": False,
    "trunk": [
        {"hierarchy": {"chunker": {"dynamic_chunks": {"width": 48, "ratio": 4, "ratio_coef": 10.0}},
                       "encoder": "gla", "of": [{"attention": {"num_heads": 2}}], "decoder": "gla"}}
    ],
}  # fmt: skip
SKIPS = {**DEEP, "trunk": ["gla", {"route": {"router": {"skip_layer": {"density_coef": 10.0}}}, "of": ["attention"]}]}
TASK = {"source": "mqar", "num_pairs": 4}
TRAIN = {"steps": 4, "batch_size": 8, "seq_len": 32, "lr": 1e-3, "eval_every": 0, "checkpoint_every": 0}


def losses(config, layout, accumulation=1):
    """Of each step of a short run; what every rank sees must agree."""
    from zoo.train import titan

    document = {
        "data": TASK,
        **config,
        "train": {**TRAIN, **config.get("train", {}), "accumulation": accumulation},
        "parallel": layout,
    }
    found = []
    job = job_of(document, on_step=lambda record: found.append((record["loss"], record["grad_norm"])))
    check(job.build("meta"), job.parallel, job.train.seq_len)
    done = titan.fit(job)
    return found, done.parameters, {name: t.double().sum().item() for name, t in done.state.items()}


@pytest.mark.parametrize(
    ("config", "layout", "pieces"),
    [
        (HYBRID, {"dp_shard": 2}, 1),
        (HYBRID, {"tp": 2}, 1),
        (MIXTURE, {"dp_replicate": 2}, 1),
        (MIXTURE, {"tp": 2}, 1),
        (MIXTURE, {"ep": 2}, 1),
        (MIXTURE, {"pp": 2}, 2),
        (DEEP, {"pp": 2, "schedule": "Interleaved1F1B"}, 1),
        (DEEP, {"pp": 2, "schedule": "GPipe", "microbatches": 8}, 1),
        (VISION, {"dp_shard": 2}, 1),
        (VISION, {"pp": 2}, 2),
        (CHUNKS, {"dp_shard": 2}, 1),
    ],
    ids=(
        "hybrid dp",
        "hybrid tp",
        "moe hsdp",
        "moe tp",
        "moe ep",
        "moe pp",
        "interleaved",
        "gpipe",
        "vit dp",
        "vit pp",
        "dynamic chunks dp",
    ),
)
def test_layouts_do_not_change_what_is_learnt(workers, config, layout, pieces):
    wanted, count, weights = losses(config, {}, pieces)
    ranks = workers(2).run(losses, config, layout, timeout_s=120)
    for found, parameters, _ in ranks:
        assert torch.tensor(found) == pytest.approx(torch.tensor(wanted), rel=1e-4)
        assert parameters == count
    states = [state for *_, state in ranks]
    assert states[0].keys() == weights.keys() and not states[1]  # only the first rank holds whole weights
    assert states[0] == pytest.approx(weights, rel=1e-3, abs=1e-2)


def test_pipelines_of_slices(workers):
    wanted, _, weights = losses(MIXTURE, {}, 2)
    ranks = workers(4).run(losses, MIXTURE, {"pp": 2, "cp": 2}, timeout_s=120)
    for found, *_ in ranks:
        assert torch.tensor(found) == pytest.approx(torch.tensor(wanted), rel=1e-4)
    assert ranks[0][2] == pytest.approx(weights, rel=1e-3, abs=1e-2) and not any(state for *_, state in ranks[1:])


def skipping(layout):
    """Losses of skipped layers, without the noise that ranks draw for rows of their own."""

    def hard(z, temperature, hard):
        p = z.softmax(-1)
        return torch.nn.functional.one_hot(p.argmax(-1), 2) + (p - p.detach())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "gumbel_softmax", hard)
        return losses(SKIPS, layout)[0]


def test_the_density_of_a_body_is_that_of_all_rows(workers):
    wanted = skipping({})
    for found in workers(2).run(skipping, {"dp_shard": 2}):
        assert torch.tensor(found) == pytest.approx(torch.tensor(wanted), rel=1e-4)


def refusal(config, **layout):
    model = zoo.build({"vocab_size": 257, **config} if "vision" not in config else config, device="meta")
    with pytest.raises(ConfigError) as caught:
        check(model, ParallelSection.from_mapping(layout), 32)
    return str(caught.value)


def test_what_a_graph_cannot_do_is_refused_with_the_way_out():
    assert "tie_embeddings: false" in refusal(HYBRID, pp=2)
    assert "needs 4 layers, the trunk has 2" in refusal(MIXTURE, pp=2, schedule="Interleaved1F1B")
    assert "4 experts cannot be spread evenly over 3" in refusal(MIXTURE, ep=3)
    assert "no mixture of experts" in refusal(HYBRID, ep=2)
    shared = {**MIXTURE, "trunk": [{"swiglu": {}, "share": "a"}, "gla", {"share": "a"}]}
    assert "share" in refusal(shared, pp=2)
    inside = {**MIXTURE, "trunk": [["gla", {"swiglu": {}, "share": "a"}], ["gla", {"swiglu": {}, "share": "a"}]]}
    assert "share" in refusal(inside, pp=2)
    assert "BlockDiffusionLM sends two copies" in refusal({**MIXTURE, "diffusion": {}}, pp=2)
    leaves = {"loop": {"steps": 2, "router": {"exit": {"metric": "kl"}}}, "of": ["gla"]}
    assert "layers.1.router: exit (metric: kl) asks the head" in refusal({**DEEP, "trunk": ["gla", leaves]}, pp=2)
    leaves["loop"]["router"] = "exit"
    check(zoo.build({**DEEP, "trunk": ["gla", leaves]}, device="meta"), ParallelSection(pp=2), 32)


def test_numbers_of_ranks_must_multiply():
    assert ParallelSection.from_mapping({"tp": 2}).data_ranks(8) == 4
    assert ParallelSection.from_mapping({"dp_replicate": 2, "dp_shard": 2, "cp": 2}).data_ranks(8) == 4
    with pytest.raises(ConfigError, match="does not give the 8 processes"):
        ParallelSection.from_mapping({"dp_shard": 3}).data_ranks(8)
    with pytest.raises(ConfigError, match="goes with tp: 1"):
        ParallelSection.from_mapping({"ep": 2, "tp": 2})


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"ep": 4, "dp_shard": 2}, "parallel.ep: must divide dp_shard * cp, 2 ranks, got 4"),
        ({"ep": 3, "dp_shard": 2, "cp": 2}, "parallel.ep: must divide dp_shard * cp, 4 ranks, got 3"),
        ({"dp_replicate": 3}, "train.batch_size: 8 is no multiple of 3 data-parallel ranks"),
        ({"pp": 2, "microbatches": 3}, "parallel.microbatches: must divide the 8 rows of a rank, got 3"),
        ({"pp": 4, "microbatches": 2}, "at least one for each of 4 stages, got 2; GPipe takes fewer"),
        ({"pp": 2, "microbatches": 8, "dp_shard": 2}, "must divide the 4 rows of a rank, got 8"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(layout, words):
    section = ParallelSection.from_mapping({"dp_shard": 1, **layout})
    ranks = section.dp_replicate * section.dp_shard * section.cp * section.pp
    with pytest.raises(ConfigError) as caught:
        pieces(section, TrainSection(batch_size=8), ranks)
    assert words in str(caught.value)


def test_rounds_of_an_interleaved_pipeline():
    section = ParallelSection(dp_shard=1, pp=2, schedule="Interleaved1F1B", microbatches=5)
    with pytest.raises(ConfigError, match="in rounds of 2 ranks, got 5; use a multiple"):
        pieces(section, TrainSection(batch_size=10), 2)


def test_stages_are_balanced():
    assert pipeline.balanced([1, 1, 1, 1], 2) == [range(0, 2), range(2, 4)]
    assert pipeline.balanced([5, 1, 1, 1, 1], 2) == [range(0, 1), range(1, 5)]
    assert pipeline.balanced([1, 1, 9], 3) == [range(0, 1), range(1, 2), range(2, 3)]
