"""What a recipe asks for is the same on two ranks as on one."""

import pytest
import torch
from test_layouts import HYBRID, MIXTURE, losses

STAGED = {
    "optimizer": "muon",
    "groups": [{"match": "layers.1", "lr_scale": 0.5, "weight_decay": 0.0}],
    "curriculum": [
        {"until": 0.5, "freeze": ["layers.0"]},
        {"until": 1.0, "enable": ["layers.1"], "ramp": {"layers.1": {"strength": 0.0}}},
    ],
}
LEAN = {"activation_checkpoint": "selective", "loss_chunks": 3}


@pytest.mark.parametrize(
    ("config", "recipe", "layout", "pieces", "tolerance"),
    [
        (HYBRID, STAGED | LEAN, {"dp_shard": 2}, 1, 1e-4),
        (HYBRID, STAGED | LEAN, {"tp": 2}, 1, 1e-4),
        (MIXTURE, STAGED | LEAN, {"ep": 2}, 1, 1e-4),
        (MIXTURE, STAGED, {"pp": 2}, 2, 1e-4),
        (MIXTURE, STAGED | LEAN, {"cp": 2}, 1, 1e-4),
        (HYBRID, {"dtype": "bfloat16"}, {"dp_shard": 2}, 1, 1e-2),
    ],
    ids=("dp", "tp", "ep", "pp", "cp", "dp bfloat16"),
)
def test_layouts_do_not_change_a_recipe(workers, config, recipe, layout, pieces, tolerance):
    config = {**config, "train": recipe}
    wanted, _, weights = losses(config, {}, pieces)
    ranks = workers(2).run(losses, config, layout, timeout_s=120)
    for found, *_ in ranks:
        assert torch.tensor(found) == pytest.approx(torch.tensor(wanted), rel=tolerance)
    state = ranks[0][2]  # whole weights are the first rank's
    assert list(state.values()) == pytest.approx(list(weights.values()), rel=10 * tolerance, abs=1e-2)
