"""Cache policies of attention against simulated caches, one token after the other."""

import pytest
import torch

import zoo
from zoo.blocks.attention import Attention

DIM, T, HEADS, GROUPS, D = 32, 41, 4, 2, 8


def build(cache, seed=1, **options):
    options = {"num_heads": HEADS, "num_kv_heads": GROUPS, **options}
    block = zoo.create_block("attention", DIM, dtype=torch.float64, cache=cache, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (2 / p.shape[-1] ** 0.5))
    return block


def draw(*shape, seed=2):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotate(x, position, base=10000.0):
    """x [n, D] at `position` [n]."""
    half = x.shape[-1] // 2
    angle = torch.as_tensor(position)[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def projected(block, x):
    return ((x @ p.weight.T).unflatten(-1, (-1, D)) for p in (block.q_proj, block.k_proj, block.v_proj))


def streaming_llm(block, x):
    """The cache keeps un-rotated keys; each token rotates them by their places in it."""
    q, k, v = projected(block, x)
    out, cache = torch.zeros_like(q), []
    for t in range(len(x)):
        cache.append(t)
        if len(cache) > block.cache.sinks + block.cache.window:
            del cache[block.cache.sinks]
        place = list(range(len(cache)))
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            scores = rotate(k[cache, g], place) @ rotate(q[t, h][None], place[-1:])[0] / D**0.5
            out[t, h] = scores.softmax(0) @ v[cache, g]
    return out.flatten(1) @ block.o_proj.weight.T


def h2o(block, x):
    q, k, v = projected(block, x)
    out, policy = torch.zeros_like(q), block.cache
    for g in range(GROUPS):
        held = {}  # token -> weight received
        for t in range(len(x)):
            held[t] = 0.0
            tokens = list(held)
            keys = rotate(k[tokens, g], tokens)
            for h in range(g * (HEADS // GROUPS), (g + 1) * (HEADS // GROUPS)):
                p = (keys @ rotate(q[t, h][None], [t])[0] / D**0.5).softmax(0)
                out[t, h] = p @ v[tokens, g]
                for j, weight in zip(tokens, p.tolist(), strict=True):
                    held[j] += weight
            if (t + 1) % policy.interval == 0:
                old = sorted((j for j in held if j <= t - policy.recent), key=lambda j: (-held[j], j))
                for j in old[policy.heavy :]:
                    del held[j]
    return out.flatten(1) @ block.o_proj.weight.T


CASES = [
    (streaming_llm, {"sinks": 2, "window": 7}),
    (streaming_llm, {"sinks": 5, "window": 1}),
    (streaming_llm, {"sinks": 4, "window": 37}),
    (h2o, {"heavy": 3, "recent": 4, "interval": 1}),
    (h2o, {"heavy": 5, "recent": 1, "interval": 6}),
    (h2o, {"heavy": 0, "recent": 9, "interval": 4}),
]


@torch.no_grad()
@pytest.mark.parametrize("oracle, options", CASES)
def test_against_a_simulated_cache(oracle, options):
    block, x = build({oracle.__name__: options}), draw(2, T, DIM)
    expected = torch.stack([oracle(block, row) for row in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)
    state, outputs = block.init_state(2), []
    for part in x.split([1, 1, 9, 2, 15, 1, 12], 1):
        outputs.append(block(part, state=state))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_no_distance_is_larger_than_the_cache():
    """Far behind the sinks, a token sees them as the first token that ever dropped one did."""
    block, x = build({"streaming_llm": {"sinks": 2, "window": 5}}), draw(1, T, DIM)
    x[:, 2:] = x[:, 2:3]  # all tokens but the sinks are the same
    y = block(x)
    torch.testing.assert_close(y[:, 10:], y[:, 10:11].expand(-1, T - 10, -1), rtol=1e-9, atol=1e-9)
    far = Attention(DIM, num_heads=HEADS, num_kv_heads=GROUPS, sinks=2, window=5, dtype=torch.float64)
    far.load_state_dict(block.state_dict())
    assert (far(x)[:, 40] - far(x)[:, 10]).abs().max() > 1e-3  # true distances go on growing


@torch.no_grad()
def test_a_loved_token_stays():
    """Every query likes token 3: H2O still holds it long after a window has lost it."""
    block = build({"h2o": {"heavy": 1, "recent": 2, "interval": 1}}, rope=False, num_heads=1, num_kv_heads=1)
    x = draw(1, T, DIM) * 0.1
    x[..., 0] = 1
    x[:, 3, 1] = 30
    for p in (block.q_proj, block.k_proj):
        p.weight.zero_()
    block.q_proj.weight[0, 0] = block.k_proj.weight[0, 1] = 3
    state = block.init_state(1)
    block(x, state=state)
    assert state.index[0, :, 0].tolist()[:3] == [3, T - 2, T - 1]


def test_packed_documents_and_gradients():
    ids = torch.cat([torch.full((n,), 9 - i) for i, n in enumerate((1, 9, 3, 17, 11))])[None]
    for oracle, options in (CASES[0], CASES[4]):
        block, x = build({oracle.__name__: options}), draw(1, T, DIM).requires_grad_()
        leaves, weight = [x, *block.parameters()], draw(1, T, DIM, seed=5)
        packed = block(x, doc_ids=ids)
        alone = torch.cat([block(part) for part in x.split([1, 9, 3, 17, 11], 1)], 1)
        torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)
        together, apart = (torch.autograd.grad((y * weight).sum(), leaves) for y in (packed, alone))
        torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


def test_errors():
    for cache, words in (
        ("h20", "did you mean h2o"),
        ({"h2o": {"recent": 0}}, "at least 1"),
        ({"streaming_llm": {"sink": 3}}, "did you mean sinks"),
    ):
        with pytest.raises(ValueError, match=words):
            build(cache)
    with pytest.raises(ValueError, match="does not go with window"):
        build("h2o", window=8)
    with pytest.raises(ValueError, match="it does not go with select"):
        build("h2o", select="quest")
