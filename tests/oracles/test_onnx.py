"""Exported ONNX files run by onnxruntime: the same logits, at other sizes where these were left open."""

from __future__ import annotations

import pytest
import torch
from exported_models import MODELS

import zoo
from zoo.export import traced

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize(
    "config, sizes, shape",
    [
        (MODELS["llama"], ("batch", "length"), (3, 71)),
        ({**MODELS["mamba2"], "trunk": ["mamba2"]}, ("batch",), (3, 24)),
    ],
    ids=["llama", "mamba2"],
)
def test_onnx(config, sizes, shape, tmp_path, capfd):
    model = zoo.build(config, seed=1)
    assert traced.export_onnx(model, tmp_path, 24) == ("model.onnx", sizes)
    assert capfd.readouterr() == ("", "")
    made = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(made)
    assert {node.domain for node in made.graph.node} <= {"", "pkg.onnxscript.torch_lib"}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = torch.randint(model.vocab_size, shape)
    (logits,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(tokens), rtol=1e-4, atol=1e-4)
