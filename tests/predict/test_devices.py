"""The table of devices, and files that add to it."""

import pytest

from zoo import devices
from zoo.errors import ConfigError

CARD = """\
name: ThisCard
memory: 1.6e10
bandwidth: 5.0e+11
matrix: {float32: 2e13, bfloat16: 8.0e+13}
vector: 2e13
power: 200
"""


@pytest.mark.parametrize("device", devices.DEVICES.values(), ids=lambda d: d.name)
def test_every_device_is_whole(device):
    assert device.matrix["float64"] <= device.matrix["float32"] <= device.matrix["bfloat16"]
    assert device.vector <= device.matrix["bfloat16"] and device.source and device.power > 0
    assert 1e9 < device.memory < 1e12 and 1e11 < device.bandwidth < 1e13
    assert device.network <= device.link and device.speed(8, 1) == device.link
    assert device.speed(2, 8) == device.network


def test_names():
    assert devices.named("h100") is devices.named("H100") and devices.named("RTX 4090").name == "RTX4090"
    assert devices.named("cpu").memory > 1e8
    with pytest.raises(ConfigError, match=r"--device H1000: unknown; did you mean h100.*MI300X"):
        devices.named("H1000")
    with pytest.raises(ConfigError, match="A100 has no products in float8"):
        devices.named("a100").flops("float8")


@pytest.mark.parametrize(
    "card, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA T4", None),
    ],
)
def test_cards_are_recognised(card, name):
    found = devices.recognised(card)
    assert (found and found.name) == name


def test_a_file_adds_a_device(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text(CARD)
    found = devices.named(str(path))
    assert (found.name, found.memory, found.flops("bfloat16"), found.power) == ("ThisCard", 1.6e10, 8e13, 200.0)
    assert found.node == 8 and found.source == str(path)


@pytest.mark.parametrize(
    "change, problems",
    [
        (("memory: 1.6e10", "memory: lots"), ["memory: must be a positive number, got 'lots'"]),
        (("power: 200", "watts: 200"), ["watts: unknown field"]),
        (("float32: 2e13", "flaot32: 2e13"), ["matrix.flaot32: unknown dtype; one of float64"]),
        (("name: ThisCard\n", ""), ["name: is missing"]),
        (("vector: 2e13\npower: 200", "vector: -1\npower: true"), ["vector: must", "power: must"]),
        ((CARD, "- 1"), ["must be a mapping"]),
        ((CARD, "a: [1"), ["line", "no YAML"]),
    ],
)
def test_a_wrong_file_is_told_in_full(tmp_path, change, problems):
    path = tmp_path / "card.yaml"
    path.write_text(CARD.replace(*change))
    with pytest.raises(ConfigError) as error:
        devices.load(path)
    assert all(p in str(error.value) for p in problems)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        devices.named(str(tmp_path / "none.yaml"))
