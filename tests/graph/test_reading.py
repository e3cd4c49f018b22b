"""The YAML reader: values, marks, and what it refuses."""

import pytest

from zoo.errors import ConfigError
from zoo.graph.reading import MAX_BYTES, read_file, read_text, show_path


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_text(text, "f.yaml")
    return str(caught.value)


def test_values():
    got = read_text(
        "a: 1\nb: 1e-3\nc: .5\nd: true\ne: ~\nf: '1'\ng: [x, {y: -2}]\nh: 0x10\ni: 1_000\nj: no\nk: 1:30\n"
    ).value
    assert got == {
        "a": 1, "b": 1e-3, "c": 0.5, "d": True, "e": None, "f": "1", "g": ["x", {"y": -2}], "h": 16, "i": 1000,
        "j": "no", "k": "1:30",
    }  # fmt: skip


def test_marks_are_of_the_key():
    source = read_text("a:\n  - b: 1\n    cc: {d: 2}\n")
    assert source.marks[("a", 0, "cc")] == (3, 5)
    assert source.marks[("a", 0, "cc", "d")] == (3, 10)
    assert str(source.problem(("a", 0, "cc", "d", "deeper"), "wrong")) == "config:3:10 a[0].cc.d.deeper: wrong"


def test_alias_and_merge():
    assert read_text("a: &x {p: 1}\nb: *x\nc:\n  <<: *x\n  q: 2\n").value["c"] == {"p": 1, "q": 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.system ['true']", "tag"),
        ("a: !env HOME", "tag"),
        ("a: [1, 2", "YAML"),
        ("a: 1\na: 2", "twice"),
        ("? [1]\n: 2", "key"),
        ("a: &x [*x]", "alias"),
        ("a: 1\n---\nb: 2", "more than one document"),
        ("a: " + "[" * 100 + "]" * 100, "nested deeper"),
        ("a: \x00", "YAML"),
    ],
)
def test_refused(text, words):
    message = refused(text)
    assert words in message
    assert message.startswith("f.yaml:")


def test_alias_bomb():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "aliases expand" in refused("\n".join(lines))


def test_files(tmp_path):
    for name, content, words in (
        ("big.yaml", b"a: 1\n" * MAX_BYTES, "bytes"),
        ("binary.yaml", b"\x80\x81\xfe\xff", "UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            read_file(tmp_path / name)
    with pytest.raises(ConfigError, match="No such file"):
        read_file(tmp_path / "absent.yaml")


def test_show_path():
    assert show_path(("trunk", 0, "of", 3, "moba", "topk")) == "trunk[0].of[3].moba.topk"
