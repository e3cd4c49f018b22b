"""Two thousand mutated configurations: each builds or gives a ConfigError, never anything else."""

import copy
import random

import pytest

import zoo
from zoo.graph.loader import load_graph
from zoo.graph.reading import read_text

BASE = """
name: fuzz
dim: 32
vocab_size: 40
norm: rms
define:
  a: [{swiglu: {hidden_dim: 16}}, swiglu]
  b: {parallel: [swiglu, {swiglu: {bias: true}}], norm: layer, merge: gated, gates: [1.0, 0.5]}
trunk:
  - {repeat: 4, of: [a, b], at: {odd: a, -1: b}}
  - {repeat: 4, of: a, tie: middle_cycle, unique: 3}
  - {loop: {steps: 3, router: {expert_choice: {capacity: [1.0, 0.5, 0.25]}}, of: [a]}}
  - {loop: {steps: 2, router: {act: {eps: 0.05}}, of: a, inject: add, tie: sequence}}
  - {loop: {steps: 3, of: a, inject: concat, start: noise, sample_sigma: 0.5, ring: 1, final_norm: rms, router: exit}}
  - {loop: {steps: 3, of: [a, a], kv: first, router: {expert_choice: {capacity: [1.0, 0.5, 0.25], warmup_steps: 3}}}}
  - {route: a, router: {skip_layer: {density: 0.5}}}
  - {feedback: a, inner: 2, outer: 2, halt: true}
  - {route: {bodies: [a, skip], router: token_choice}}
  - {route: a}
  - {hierarchy: {chunker: {dynamic_chunks: {width: 48, ratio: 2}}, encoder: a, of: [b], decoder: a}}
  - {hierarchy: {chunker: fixed_chunks, of: a, decoder: a}}
  - {swiglu: {hidden_dim: 24}, share: s, residual: {style: sandwich, scale: 0.5, learn: scalar}}
  - {share: s}
train: {steps: 3, lr: 1e-3}
"""
STRANGE = [
    None, True, False, 0, -1, 1, 2.5, 1e300, float("nan"), float("inf"), 10**30, "", "x", "swiglu", "a", "skip", "rms",
    "${dim}", "${", "${x:y}", "\x00", "😀", [], {}, [[]], [None], {"x": 1}, {None: None}, {1: 2}, ["a", ["b"]], "loop",
    {"swiglu": {}}, {"share": "s"}, {"repeat": 2, "of": "a"}, {"loop": 3}, [1, 2], [0.5, "a"], "odd", {"act": {}},
]  # fmt: skip

BROKEN = [*"{}[]:,-&*!|>'\"#%@` \n\t\\x0", "\x07", "é", "", "  "]


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutate(document, rng):
    path = rng.choice([p for p in places(document) if p])
    parent = document
    for part in path[:-1]:
        parent = parent[part]
    action = rng.random()
    if action < 0.5:
        parent[path[-1]] = copy.deepcopy(rng.choice(STRANGE))
    elif action < 0.7:
        del parent[path[-1]]
    elif isinstance(parent, dict):
        key = rng.choice(["x", "dim", "steps", "of", "share", "norm", "residual", 3, None, "tie", "at", "router"])
        parent[key] = copy.deepcopy(rng.choice(STRANGE))
    else:
        parent.insert(path[-1], copy.deepcopy(rng.choice(STRANGE)))


@pytest.mark.parametrize("seed", range(20))
def test_mutated_configurations(seed):
    rng = random.Random(seed)
    original = read_text(BASE).value
    outcomes = set()
    for _ in range(100):
        document = copy.deepcopy(original)
        for _ in range(rng.randint(1, 3)):
            mutate(document, rng)
        try:
            load_graph(document)
            outcomes.add("built")
        except zoo.ConfigError as error:
            assert error.problems and all(str(p) for p in error.problems)
            outcomes.add("refused")
    assert outcomes == {"built", "refused"}


@pytest.mark.parametrize("seed", range(5))
def test_mutated_text(seed, tmp_path):
    rng = random.Random(seed)
    for number in range(60):
        text = list(BASE)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(text))
            text[place] = rng.choice(BROKEN)
        path = tmp_path / f"{number}.yaml"
        path.write_text("".join(text))
        try:
            load_graph(path)
        except zoo.ConfigError as error:
            assert str(path) in str(error)
