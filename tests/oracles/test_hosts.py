"""Blocks in models of timm and flash-linear-attention: `make oracles` puts both where only these tests see them."""

from __future__ import annotations

import enum
import importlib.abc
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo import graft
from zoo.blocks import GatedLinearAttention

pytest.importorskip("fla", reason="flash-linear-attention is not installed: make oracles")


ROOT = Path(__file__).resolve().parents[2]


class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """timm imports torchvision for transforms of images and one norm, none of which a ViT runs; the wheel of the
    registry wants torch with CUDA."""

    class InterpolationMode(enum.Enum):
        NEAREST, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = range(6)

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "torchvision":
            return importlib.util.spec_from_loader(fullname, self, is_package=True)
        return None

    def exec_module(self, module):
        module.InterpolationMode = self.InterpolationMode

        def absent(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (nn.Module,), {})

        module.__getattr__ = absent


@pytest.fixture
def timm(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, NoTorchvision()])
    yield pytest.importorskip("timm", reason="timm is not installed: make oracles")
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


@pytest.fixture
def vit(timm):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 4, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


def test_readme(timm, capsys):
    """What README shows of both."""
    (text,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    exec(compile(text, "README.md", "exec"), {})
    shape, counts = capsys.readouterr().out.splitlines()
    assert shape == "torch.Size([1, 10])" and "kept" in counts


@torch.no_grad()
def test_a_vit_of_timm(vit):
    """Our attention takes the rows of qkv and computes the same; a linear mixer takes its place as well."""
    x = torch.randn(2, 3, 32, 32)
    want = vit(x)
    done = graft.replace(vit, "blocks.*.attn", "attention", causal=False, rope=False)
    assert done.counts() == {"mapped": 16} or done.counts() == {"kept": 16}
    torch.testing.assert_close(vit(x), want, atol=1e-5, rtol=0)
    done.undo()
    graft.replace(vit, "blocks.1.attn", "gla")
    assert vit(x).shape == want.shape and not torch.allclose(vit(x), want)


def test_a_model_of_fla():
    """A layer of fla's GLA model by ours, with its weights: the plan names them, the host streams and learns."""
    from fla.models import GLAConfig, GLAForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 61, "intermediate_size": 96}
    model = GLAForCausalLM(GLAConfig(**sizes, fuse_norm=False, fuse_swiglu=False, fuse_cross_entropy=False))
    done = graft.plan(model, "model.layers.*.attn", "gla", num_heads=2)
    assert {"q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight", "o_proj.weight"} <= {
        e.tensor for e in done.entries if e.action == "kept"
    }
    done.apply()
    assert isinstance(model.model.layers[0].attn.block, GatedLinearAttention)
    y = model.model.layers[0].attn(hidden_states=torch.randn(2, 9, 64))
    assert len(y) == 3 and y[0].shape == (2, 9, 64)
    y[0].square().mean().backward()
    assert model.model.layers[0].attn.block.q_proj.weight.grad is not None
