"""The grammar: what a configuration means, and that every mistake is reported with its place."""

import textwrap

import pytest
from omegaconf import OmegaConf

import zoo
from zoo.graph.loader import load_graph
from zoo.graph.reading import read_text
from zoo.graph.repeat import chosen, tie_order

HEAD = "dim: 32\nvocab_size: 50\n"


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(textwrap.dedent(text))
    return path


def problems(tmp_path, text) -> list[str]:
    with pytest.raises(zoo.ConfigError) as caught:
        zoo.load_config(write(tmp_path, text))
    assert "Traceback" not in str(caught.value)
    return [str(p).split("c.yaml:", 1)[-1] for p in caught.value.problems]


def layers(trunk, **top):
    return load_graph({"dim": 32, "vocab_size": 50, "trunk": trunk, **top}).trunk


def test_layer_forms():
    forms = (
        [{"sequence": ["swiglu", {"swiglu": {}}]}],
        [["swiglu", {"swiglu": None}]],
        ["a"],
        [{"a": None}],
        [{"repeat": 1, "of": "a"}],
        [{"repeat": {"times": 1, "of": ["swiglu", "swiglu"]}}],
    )
    for trunk in forms:
        (layer,) = layers(trunk, define={"a": ["swiglu", "swiglu"]})
        assert [c.name for c in layer.children] == ["swiglu", "swiglu"]


def test_a_forty_layer_two_mixer_hybrid_fits_in_fifteen_lines():
    text = HEAD + textwrap.dedent("""\
        define:
          a: [{gla: {num_heads: 4}}, swiglu]
          b: [{attention: {num_heads: 4}}, swiglu]
        trunk:
          - {repeat: 10, of: [a, a, a, b]}
        """)
    assert text.count("\n") <= 15
    assert len(load_graph(read_text(text).value).trunk) == 40


def test_repeat_unrolls_places_and_schedules():
    node = {"repeat": 6, "of": {"swiglu": {"hidden_dim": [16, 32]}}, "at": {"-1": "b", "::3": "a"}}
    got = layers([node], define={"a": {"swiglu": {"hidden_dim": 8}}, "b": {"swiglu": {"hidden_dim": 9}}})
    widths = [next(s for s in item.walk() if s.name == "swiglu").options["hidden_dim"] for item in got]
    assert widths == [8, 19, 22, 8, 29, 9]


def test_schedule_of_the_same_length_is_taken_item_by_item():
    got = layers([{"repeat": 3, "of": {"swiglu": {"hidden_dim": [7, 5, 9]}}}])
    assert [c.children[0].options["hidden_dim"] for c in got] == [7, 5, 9]


@pytest.mark.parametrize(
    ("tie", "times", "unique", "order"),
    [
        ("all", 3, 3, (0, 0, 0)),
        ("cycle", 6, 3, (0, 1, 2, 0, 1, 2)),
        ("sequence", 6, 3, (0, 0, 1, 1, 2, 2)),
        ("middle_cycle", 6, 4, (0, 1, 2, 1, 2, 3)),
        ("middle_sequence", 6, 4, (0, 1, 1, 2, 2, 3)),
    ],
)
def test_tying_maps(tie, times, unique, order):
    assert tie_order(times, unique, tie) == order


def test_tied_repeat_has_one_set_of_weights_per_unique_copy():
    model = zoo.build(
        {"dim": 32, "vocab_size": 50, "trunk": [{"repeat": 6, "of": "swiglu", "tie": "cycle", "unique": 2}]}
    )
    one = zoo.build({"dim": 32, "vocab_size": 50, "trunk": ["swiglu"]})
    per_layer = sum(p.numel() for p in one.layers.parameters())
    assert sum(p.numel() for p in model.layers.parameters()) == 2 * per_layer


def test_selectors():
    assert list(chosen("odd", 5)) == [1, 3]
    assert list(chosen("1, -1", 5)) == [1, 4]
    assert list(chosen("1:4:2", 5)) == [1, 3]
    for bad in ("x", "9", "::0", "1..2", ""):
        with pytest.raises(ValueError):
            list(chosen(bad, 5))


def test_share_is_one_module_with_state_of_its_own_at_each_site():
    model = zoo.build(
        {"dim": 32, "vocab_size": 50, "trunk": [{"swiglu": None, "share": "s"}, "swiglu", {"share": "s"}]}
    )
    assert model.layers[0] is model.layers[2]
    assert len(model.init_state(1).children) == 3


def test_overrides_and_interpolation(tmp_path):
    path = write(tmp_path, 'dim: 32\nvocab_size: 50\ntrunk: [{swiglu: {hidden_dim: "${dim}"}}]\n')
    config = zoo.load_config(path, ["dim=48", "trunk[0].swiglu.bias=true", "name=x"])
    assert config.trunk[0].swiglu == {"hidden_dim": 48, "bias": True}
    assert config.name == "x"
    assert OmegaConf.is_config(config)
    with pytest.raises(zoo.ConfigError, match=r"override trunk\[0\]\.swiglu\.hiden=3.*did you mean hidden_dim"):
        zoo.load_config(path, ["trunk[0].swiglu.hiden=3"])
    for bad in ("nonsense", "=3", "trunk[9].x=1"):
        with pytest.raises(zoo.ConfigError, match="override"):
            zoo.load_config(path, [bad])


def test_all_problems_at_once_with_file_line_column_and_hint(tmp_path):
    got = problems(
        tmp_path,
        """\
        dim: 32
        vocab_size: fifty
        nmae: x
        define:
          a: [{swiglu: {hiden_dim: 3}}]
        trunk:
          - a
          - {swiglu: {bias: 4, hidden_dim: -1}}
          - repeat: 2
            off: a
        """,
    )
    assert got == [
        "2:1 vocab_size: must be an integer, got 'fifty'",
        "3:1 nmae: unknown key; did you mean name?",
        "5:17 define.a[0].swiglu.hiden_dim: unknown option of swiglu; did you mean hidden_dim?",
        "8:15 trunk[1].swiglu.bias: must be true or false, got 4",
        "8:24 trunk[1].swiglu.hidden_dim: must be at least 1, got -1",
        "9:5 trunk[2]: repeat needs the field of",
        "10:5 trunk[2].off: unknown field of repeat; did you mean of?",
    ]


@pytest.mark.parametrize(
    ("trunk", "words"),
    [
        ("[]", "at least one node"),
        ("[swiglo]", "did you mean swiglu"),
        ("[[]]", "the list is empty"),
        ("[3]", "a node is a name, a list or a mapping"),
        ("[rms]", "rms is a norm, not a block"),
        ("[act]", "act is a router, not a block"),
        ("[{swiglu: {dim: 8}}]", "width comes from the model's dim"),
        ("[{swiglu: {}, norm: rsm}]", "did you mean rms"),
        ("[{swiglu: {}, mlpp: {}}]", "unexpected key"),
        ("[{share: x}]", "no node before this one"),
        ("[{share: x, sequence: [swiglu, {share: x}]}]", "contains itself"),
        ("[{swiglu: {}, share: x}, {swiglu: {bias: true}, share: x}]", "differ"),
        ("[{feedback: {}}]", "feedback needs the field of"),
        ("[{swiglu: {hidden_dim: [8, 16]}}]", "depth schedule only inside repeat"),
        ("[{repeat: 4, of: swiglu, tie: cycle, unique: 3}]", "evenly"),
        ("[{repeat: 4, of: swiglu, at: {9: swiglu}}]", "does not exist"),
        ("[{loop: {steps: 2, of: swiglu, router: expert_chioce}}]", "did you mean expert_choice"),
        ("[{loop: {steps: 2, of: swiglu, router: {expert_choice: {capacity: [0.5, 1.0]}}}}]", "must not grow"),
        ("[{loop: {steps: 2, of: swiglu, router: {expert_choice: {inference: top_k}}}}]", "looks at later tokens"),
        ("[{attention: {causal: false}}]", "looks at later tokens"),
        ("[{attention: {num_heads: 5, num_kv_heads: 2}}]", "attention:"),
        ("[{route: {bodies: [skip, skip]}}]", "every body is skip"),
        ("[{parallel: [swiglu]}]", "at least two branches"),
        ("[{revisit: {of: swiglu, at: 0}}]", "needs this option"),
        ("[{revisit: {of: swiglu, at: 1, hidden_dim: 8}}]", "copy 1 does not exist"),
        ("[{revisit: {of: swiglu, at: 0, hidden_dim: 8, copies: 2}}]", "more than the number of sites, 1"),
        ("[{revisit: {of: swiglu, at: 0, hidden_dim: 8, attention: {num_heads: 5}}}]", "num_heads=5 does not divide"),
        ("[{revisit: {of: swiglu, at: 0, hidden_dim: 8, attention: {causal: false}}}]", "looks at later tokens"),
        ("[{repeat: 100000, of: swiglu}]", "at most"),
        ("[{repeat: 5000, of: {repeat: 5000, of: swiglu}}]", "more than 20,000 nodes"),
    ],
)
def test_mistakes(tmp_path, trunk, words):
    got = problems(tmp_path, f"{HEAD}trunk: {trunk}\n")
    assert any(words in p for p in got), got


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("define: {a: [b], b: [a]}", "contains itself: a -> b -> a"),
        ("define: {swiglu: [mlp]}", "is taken"),
        ("define: {unused: [swiglo]}", "did you mean swiglu"),
        ('name: "${oc.env:HOME}"', "resolvers"),
        ('name: "${nme}"', "refers to nothing"),
        ('name: "${name}"', "itself"),
        ("define: 3", "mapping"),
        ("architecture: causal_ml", "did you mean causal_lm"),
        ("train: {stepps: 3}", "did you mean steps"),
    ],
)
def test_top_level_mistakes(tmp_path, line, words):
    got = problems(tmp_path, f"{HEAD}{line}\ntrunk: [swiglu]\n")
    assert any(words in p for p in got), got


def test_interpolation_bomb(tmp_path):
    chain = "".join(f'  x{i}: ["${{define.x{i - 1}}}", "${{define.x{i - 1}}}"]\n' for i in range(1, 40))
    got = problems(tmp_path, f"{HEAD}define:\n  x0: [swiglu]\n{chain}trunk: [x39]\n")
    assert any("expand" in p or "chained" in p for p in got)


def test_missing_file_suggests_a_shipped_name():
    with pytest.raises(zoo.ConfigError, match="did you mean hydra_small"):
        zoo.load_config("hydra_smal")
