"""Models of the zoo under lm-evaluation-harness. The scores need no harness; its own loop is run where it is there."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import zoo
from zoo.errors import ConfigError, ZooError
from zoo.train import harness
from zoo.train.harness import Scorer, run_task
from zoo.train.suite import Trained, evaluate_run
from zoo.train.tokenizer import ByteTokenizer

MODEL = {
    "name": "small",
    "dim": 16,
    "vocab_size": 257,
    "trunk": [[{"gla": {"num_heads": 2}}, {"mlp": {"hidden_dim": 24}}], [{"attention": {"num_heads": 2}}]],
    "train": {"seq_len": 64},
}


def ask(*args):
    return SimpleNamespace(args=args)


def log_p(model, context, continuation):
    """By one forward of the whole text."""
    ids = torch.tensor([[256, *context, *continuation]])
    with torch.no_grad():
        told = model(ids).log_softmax(-1)[0, len(context) : -1]
    labels = torch.tensor(list(continuation))
    return float(told.gather(-1, labels[:, None]).sum()), bool((told.argmax(-1) == labels).all())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = zoo.build(MODEL, dtype=torch.float64)
    torch.nn.init.normal_(made.lm_head.weight)  # far from even, so that greedy answers exist
    return made.eval()


def test_continuations_get_what_a_forward_of_the_whole_gives(model, monkeypatch):
    monkeypatch.setattr(harness, "SEGMENT", 5)
    monkeypatch.setattr(harness, "AT_ONCE", 2)
    told = []
    scorer = Scorer(model, ByteTokenizer(), 64, lambda done, total: told.append((done, total)))
    likely = bytes(model.generate(torch.tensor([[256, *b"a context"]]), 1)[0, -1:].tolist())
    pairs = [("a context", " b"), ("another one", " word"), ("a context", " longer end"), ("", "x"), ("a context", "")]
    found = scorer.loglikelihood([ask(*p) for p in pairs])
    for (context, rest), (value, greedy) in zip(pairs, found, strict=True):
        if rest:
            wanted = log_p(model, context.encode(), rest.encode())
            assert value == pytest.approx(wanted[0], abs=1e-4) and greedy == wanted[1]
    assert found[-1] == (0.0, True) and told[-1] == (5, 5) and len(told) == 5
    assert scorer.score([256, *b"a context"], [list(likely), [likely[0] ^ 1]])[0][1] is True
    assert scorer.score([256, *b"a context"], [list(likely), [likely[0] ^ 1]])[1][1] is False
    # a space at the end of the context belongs to what follows it
    assert scorer.loglikelihood([ask("a context ", "b")]) == scorer.loglikelihood([ask("a context", " b")])


def test_long_contexts_lose_their_beginning(model):
    scorer = Scorer(model, ByteTokenizer(), 12)
    assert scorer.score([256, *b"0123456789abcdef"], [list(b"xyz")]) == scorer.score(
        list(b"6789abcdef"), [list(b"xyz")]
    )


def test_windows_predict_every_token_once_with_as_much_context_as_fits(model):
    scorer = Scorer(model, ByteTokenizer(), 4)
    windows = list(scorer._windows(list(range(10))))
    assert windows == [([256], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    text = "every token once"
    (whole,) = Scorer(model, ByteTokenizer(), 64).loglikelihood_rolling([ask(text)])
    assert whole == pytest.approx(log_p(model, b"", text.encode())[0], abs=1e-4)
    (cut,) = scorer.loglikelihood_rolling([ask(text)])
    assert cut == pytest.approx(sum(scorer.score(c, [r])[0][0] for c, r in scorer._windows(list(text.encode()))))
    assert scorer.loglikelihood_rolling([ask("")]) == [0.0]


def test_generation_stops_at_the_first_stop(model, monkeypatch):
    scorer = Scorer(model, ByteTokenizer(), 64)
    made = iter([*b"one two three"])
    monkeypatch.setattr(model, "stream", lambda *a, **k: (torch.tensor([[i]]) for i in made))
    found = scorer.generate_until([ask("say", {"until": ["three", " t"], "max_gen_toks": 13})])
    assert found == ["one"]
    made = iter([*b"short", 256, *b"more"])
    assert scorer.generate_until([ask("say", {"until": "never"})]) == ["short"]
    monkeypatch.undo()
    (text,) = scorer.generate_until([ask("say", {"until": [], "max_gen_toks": 5})])
    ids = model.generate(torch.tensor([[256, *b"say"]]), 5)[0, 4:].tolist()
    assert text == ByteTokenizer().decode(ids[: ids.index(256)] if 256 in ids else ids)


def test_without_the_harness_one_sentence_says_how_to_get_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ZooError, match=r"lm_eval:hellaswag needs the extra `eval`: pip install 'block-zoo\[eval\]'"):
        run_task("hellaswag", model, ByteTokenizer(), max_length=64)


def test_a_task_of_the_harness(tmp_path):
    """The harness' own loop over a task of two documents, whose data lie here."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in (("up", 0), ("in", 1))))
    (tmp_path / "t.yaml").write_text(
        f"task: directions\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'd.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: 'not {{q}} but'\n"
        "doc_to_choice: ['down', 'out of it']\ndoc_to_target: a\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    zoo.build(MODEL | {"data": {"source": "python-stdlib"}}).save_pretrained(tmp_path / "m")
    trained = Trained.load(tmp_path / "m")
    whole = TaskManager.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TaskManager, "__init__", lambda self: whole(self, include_path=str(tmp_path), include_defaults=False)
        )
        (found,) = evaluate_run(trained, ["lm_eval:directions"])
        with pytest.raises(ConfigError, match="the harness has no task of this name"):
            evaluate_run(trained, ["lm_eval:nothing"])
    scorer = Scorer(trained.model, ByteTokenizer(), 64)
    choices = [" down", " out of it"]
    right = 0
    for question, answer in (("up", 0), ("in", 1)):
        values = [v for v, _ in scorer.loglikelihood([ask(f"not {question} but", c) for c in choices])]
        right += values.index(max(values)) == answer
    assert found["figures"]["acc"] == right / 2 and "acc_norm" in found["figures"]
    assert json.loads((tmp_path / "m" / "evaluation" / "lm_eval-directions.json").read_text()) == found
