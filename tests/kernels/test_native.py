"""C cores are built on first use, kept, and never required."""

from __future__ import annotations

import os
import stat

import pytest
import torch

from zoo.errors import KernelUnavailable
from zoo.kernels import dispatch, native
from zoo.kernels.attention import attention

CACHES = (native._compiler, native._build, native._library, native.missing)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A user with an empty cache who has called nothing yet."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "_answers", {})
    monkeypatch.setattr(native, "_functions", {})
    for f in CACHES:
        f.cache_clear()
    yield tmp_path
    for f in CACHES:
        f.cache_clear()


def draw(T=20):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, T, 2, 8, generator=generator) for _ in range(3)]


def chosen(op):
    return next(row.backend for row, word in dispatch.explain(op) if word == "chosen")


def reason(op):
    return next(word for row, word in dispatch.explain(op) if row.backend == "native")


def compiler(path, script):
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="this machine has no C compiler")


@needs_compiler
def test_built_once_and_kept(fresh):
    assert chosen("attention") == "native"
    (built,) = (fresh / "cache" / "native").iterdir()
    before = built.stat().st_mtime_ns
    for f in CACHES:
        f.cache_clear()
    attention(*draw(), backend="native")
    assert (
        [built.stat().st_mtime_ns] == [p.stat().st_mtime_ns for p in (fresh / "cache" / "native").iterdir()] == [before]
    )


def test_without_a_compiler_the_next_row_runs(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in reason("attention")
    assert chosen("attention") != "native"
    o, _ = attention(*draw())
    torch.testing.assert_close(o, attention(*draw(), backend="reference")[0])
    with pytest.raises(KernelUnavailable, match="no C compiler"):
        attention(*draw(), backend="native")


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch):
    monkeypatch.setenv("CC", compiler(fresh / "mycc", 'echo "native.c:1: error: no such register" >&2; exit 1\n'))
    assert "mycc could not build it: native.c:1: error: no such register" in reason("attention")
    assert chosen("attention") != "native"


@needs_compiler
def test_a_compiler_without_openmp_still_serves(fresh, monkeypatch):
    real = native._compiler()
    native._compiler.cache_clear()
    script = f'case "$*" in *-fopenmp*) echo "unknown option" >&2; exit 1;; esac\nexec {real} "$@"\n'
    monkeypatch.setenv("CC", compiler(fresh / "mycc", script))
    want, _ = attention(*draw(), backend="reference")
    torch.testing.assert_close(attention(*draw(), backend="native")[0], want)


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_obstacle(fresh, monkeypatch):
    blocked = fresh / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("ZOO_CACHE", str(blocked))
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(fresh))
    assert chosen("attention") == "native"
    folder = fresh / f"block-zoo-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and list(folder.iterdir())


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_value(threads):
    q, k, v = (x.requires_grad_() for x in draw(150))
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            o, _ = attention(q, k, v, backend="native")
            results.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results):
        assert torch.equal(a, b)
