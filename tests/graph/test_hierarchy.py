"""Hierarchies against models unrolled row by row and chunk by chunk, their closed forms, the law, and costs."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.graph.hierarchy import Hierarchy
from zoo.graph.nodes import Sequence

DIM, VOCAB, T = 32, 50, 29
SCAN = [{"mamba2": {"head_dim": 16, "state_dim": 8}}]
LAYER = [{"attention": {"num_heads": 4}}, {"swiglu": {"hidden_dim": 48}}]


def dynamic(main=LAYER, ends=SCAN, **chunker):
    parts = {"encoder": ends} if ends else {}
    return {"hierarchy": {"chunker": {"dynamic_chunks": chunker}, **parts, "of": main, "decoder": ends or LAYER}}


def fixed(**chunker):
    return {"hierarchy": {"chunker": {"fixed_chunks": chunker}, "of": LAYER, "decoder": LAYER}}


ONE = dynamic(width=48, ratio=3)
TWO = dynamic([SCAN[0], dynamic(width=64, ratio=2, ends=LAYER)], width=48, ratio=3)
BLOCKS = fixed(width=64, length=4)
MIXED = dynamic([LAYER, fixed(length=2)], width=40, ratio=2)
NAMES = {"dynamic": ONE, "two_stages": TWO, "fixed": BLOCKS}
KINDS = pytest.mark.parametrize("tree", NAMES.values(), ids=NAMES)
MORE = NAMES | {"mixed": MIXED, "blocks_of_one": fixed(length=1)}
ALL = pytest.mark.parametrize("tree", MORE.values(), ids=MORE)


def build(*trunk, seed=0, **top):
    """A model in fp64 whose parameters are large enough for every path to speak."""
    model = zoo.build({"dim": DIM, "vocab_size": VOCAB, "trunk": list(trunk), **top}, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(p.shape[-1:] or (1,)) ** 0.5)
    return model


def stream(rows=2, length=T, seed=1):
    return torch.randn(rows, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(rows=2, length=T, seed=2):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ naive oracles
def unrolled(node, x, seen):
    """The node on one row [T, D], a token at a time where that can be; `seen` collects (p, b) of each chunker."""
    if isinstance(node, Sequence):
        for i in node.order:
            x = unrolled(node.items[i], x, seen)
        return x
    if not isinstance(node, Hierarchy):
        return node(x[None])[0]
    if node.encoder.body is not None:
        x = node.encoder.norm(unrolled(node.encoder.body, x, seen))
    if hasattr(node.chunker, "length"):
        return unrolled_blocks(node, x, seen)
    return unrolled(node.decoder, unrolled_dynamic(node, x, seen), seen)


def unrolled_dynamic(node, x, seen):
    chunker = node.chunker
    q, k = x @ chunker.q_proj.weight.T, x @ chunker.k_proj.weight.T
    p = [x.new_ones(())]
    p += [(1 - q[t - 1] @ k[t] / (q[t - 1].norm() * k[t].norm())) / 2 for t in range(1, len(x))]
    seen.setdefault(chunker, []).extend((value, float(value >= 0.5)) for value in p)
    kept = [t for t in range(len(x)) if p[t] >= 0.5]
    entry = x[kept] if chunker.pad is None else torch.cat([x[kept], chunker.pad.expand(len(kept), -1)], 1)
    z = node.main.norm(unrolled(node.main.body, entry, seen))[:, : x.shape[1]]
    out, smooth, chunk = [], torch.zeros_like(x[0]), -1
    for t in range(len(x)):
        if p[t] >= 0.5:
            chunk += 1
            rate = p[t].clamp(1e-4, 1 - 1e-4)
            smooth = rate * z[chunk] + (1 - rate) * smooth
        c = p[t] if p[t] >= 0.5 else 1 - p[t]
        residual = chunker.residual_proj.weight @ x[t] + chunker.residual_proj.bias
        out.append((1 + c - c.detach()) * smooth + residual)
    return torch.stack(out)


def unrolled_blocks(node, x, seen):
    chunker, L = node.chunker, node.chunker.length
    context, out = [chunker.first], {}
    if len(x) >= L:
        whole = x[: len(x) // L * L].unflatten(0, (-1, L))
        embedded = torch.stack([torch.cat([chunker.embed.weight @ t for t in block]) for block in whole])
        context += list(node.main.norm(unrolled(node.main.body, embedded, seen)))
    for b, c in enumerate(context):
        prefix = (chunker.prefix_proj.weight @ c + chunker.prefix_proj.bias).unflatten(0, (chunker.prefixes, -1))
        y = unrolled(node.decoder, torch.cat([prefix, x[b * L : b * L + L - 1]]), seen)
        out.update({b * L - 1 + i: value for i, value in enumerate(y[chunker.prefixes - 1 :])})
    return torch.stack([out[t] for t in range(len(x))])


@ALL
@pytest.mark.parametrize("length", [1, 4, T])
def test_equals_the_unrolled_model(tree, length):
    node, x = build(tree).layers[0], stream(3, length)
    with torch.no_grad():
        want = torch.stack([unrolled(node, row, {}) for row in x])
        torch.testing.assert_close(node(x), want, rtol=0, atol=1e-11)


@KINDS
def test_gradients_equal_those_of_the_unrolled_model(tree):
    """Straight-through estimator and ratio losses included; rows of unequal chunk counts do not count twice."""
    node, x = build(tree).layers[0].train(), stream(3)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    (node(x) * weight).sum().backward()
    ours = {n: p.grad for n, p in node.named_parameters()}
    node.zero_grad()
    seen = {}
    loss = (torch.stack([unrolled(node, row, seen) for row in x]) * weight).sum()
    for chunker, pairs in seen.items():
        mean_p, share, n = sum(p for p, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs), chunker.ratio
        ratio = n / (n - 1) * ((n - 1) * share * mean_p + (1 - share) * (1 - mean_p))
        torch.testing.assert_close(chunker.metrics["ratio_loss"], ratio.detach(), rtol=0, atol=1e-12)
        loss = loss + chunker.ratio_coef * ratio
    loss.backward()
    for name, p in node.named_parameters():
        assert ours[name] is not None and p.grad.abs().sum() > 0, name
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_equals_the_block_transformer_of_gpt_neox_stacks():
    """Block decoder and token decoder by transformers, as the released code takes them; every block but the first."""
    from transformers import GPTNeoXConfig, GPTNeoXModel

    heads, L, prefixes = 4, 4, 2
    layer = {"parallel": [{"attention": {"num_heads": heads, "rotary_dim": 4, "bias": True}},
                          {"mlp": {"hidden_dim": 48, "bias": True}}]}  # fmt: skip
    tree = {"hierarchy": {"chunker": {"fixed_chunks": {}}, "of": {"repeat": 2, "of": layer},
                          "decoder": {"repeat": 2, "of": layer}}}  # fmt: skip
    model = build(tree, norm="layer", final_norm="layer")
    node, x = model.layers[0], tokens(2, 6 * L)
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=48,
        hidden_act="gelu", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        use_parallel_residual=True, attn_implementation="eager",
    )  # fmt: skip
    stacks = [GPTNeoXModel(config).double().eval() for _ in range(2)]
    for theirs, ours, norm in zip(stacks, (node.main.body, node.decoder), (node.main.norm, model.norm), strict=True):
        copies = ours.items[0].items
        for layer, (attention, mlp) in zip(theirs.layers, (c.items[0].branches for c in copies), strict=True):
            block = attention.block
            for name in ("weight", "bias"):  # head by head q, k, v
                parts = [getattr(p, name).unflatten(0, (heads, -1)) for p in (block.q_proj, block.k_proj, block.v_proj)]
                getattr(layer.attention.query_key_value, name).data = torch.cat(parts, 1).flatten(0, 1)
            layer.attention.dense.load_state_dict(block.o_proj.state_dict())
            layer.mlp.dense_h_to_4h.load_state_dict(mlp.block.up_proj.state_dict())
            layer.mlp.dense_4h_to_h.load_state_dict(mlp.block.down_proj.state_dict())
            layer.input_layernorm.load_state_dict(attention.norm.state_dict())
            layer.post_attention_layernorm.load_state_dict(mlp.norm.state_dict())
        theirs.final_layer_norm.load_state_dict(norm.state_dict())
    with torch.no_grad():
        table = model.tok_embeddings.weight
        blocks = x.unflatten(1, (-1, L))
        embedded = (table @ node.chunker.embed.weight.T)[blocks].flatten(2)  # the embedder's own table of width D / L
        context = stacks[0](inputs_embeds=embedded).last_hidden_state[:, :-1]
        prefix = node.chunker.prefix_proj(context).unflatten(2, (prefixes, DIM))
        inside = torch.cat([prefix, table[blocks[:, 1:, :-1]]], 2).flatten(0, 1)
        hidden = stacks[1](inputs_embeds=inside).last_hidden_state[:, prefixes - 1 :]
        want = model.lm_head(hidden.unflatten(0, (2, -1)).flatten(1, 2))
        torch.testing.assert_close(model(x)[:, L - 1 : -1], want, rtol=0, atol=1e-6)  # their angles are in float32


# -------------------------------------------------------------------------------------- closed forms
def flips(every, length=T, rows=1):
    """A stream that changes its sign every so many tokens: p is 1 there and 0 elsewhere while W_q = W_k = I."""
    sign = 1 - 2.0 * (torch.arange(length) // every % 2)
    return stream(rows, 1) * sign[:, None]


def test_a_boundary_everywhere_is_the_plain_stack():
    node = build(dynamic(ends=None)).layers[0]
    node.chunker.reset_parameters()
    x = flips(1)
    with torch.no_grad():
        plain = node.decoder(node.main(x))
        torch.testing.assert_close(node(x), plain, rtol=0, atol=2e-3)  # the clamp of p leaves 1e-4 in the smoothing
        assert not torch.equal(node(x), plain)


def test_chunks_hold_the_result_of_their_first_token():
    node = build(dynamic(ends=None)).layers[0]
    node.chunker.reset_parameters()
    x = flips(3)
    assert torch.equal(node.chunker.boundaries(x, None, None)[0] >= 0.5, torch.arange(T) % 3 == 0)
    held = node.main(x[:, ::3]).repeat_interleave(3, 1)[:, :T]
    torch.testing.assert_close(node(x), node.decoder(held), rtol=0, atol=2e-3)


def test_ratio_loss_is_one_at_the_target():
    chunker = build(dynamic(ratio=4)).layers[0].chunker
    p = torch.tensor([[1.0, 0, 0, 0] * 3], dtype=torch.float64, requires_grad=True)
    chunker._with_ratio_loss(torch.zeros(1, 12, DIM), p, p >= 0.5, None)
    assert chunker.metrics["ratio_loss"].item() == pytest.approx(1, abs=1e-12)
    padded = torch.cat([p, torch.ones(1, 5, dtype=p.dtype)], 1)
    ids = torch.tensor([[0] * 12 + [-1] * 5])
    chunker._with_ratio_loss(torch.zeros(1, 17, DIM), padded, padded >= 0.5, ids)
    assert chunker.metrics["ratio_loss"].item() == pytest.approx(1, abs=1e-12)


def test_identity_start_has_no_residual_and_splits_by_similarity():
    node = zoo.build({"dim": DIM, "vocab_size": VOCAB, "trunk": [dynamic(ends=None, width=40)]}).layers[0]
    x = stream().float()
    p = node.chunker.boundaries(x, None, None)
    torch.testing.assert_close(p[:, 1:], (1 - F.cosine_similarity(x[:, :-1], x[:, 1:], dim=-1)) / 2)
    assert (p[:, 0] == 1).all()
    assert node.chunker.residual_proj.weight.abs().max() == 0 and node.chunker.pad.abs().max() == 0


def test_blocks_of_one_token_decode_their_context_alone():
    node = build(fixed(length=1, prefixes=1)).layers[0]
    x, chunker = stream(), node.chunker
    context = chunker.prefix_proj(node.main(chunker.embed(x)))
    alone = node.decoder(context.flatten(0, 1)[:, None]).view_as(x)
    torch.testing.assert_close(node(x), alone, rtol=0, atol=1e-12)


def test_a_block_knows_others_by_their_context_only():
    node, x = build(BLOCKS).layers[0], stream(1)
    changed = x.clone()
    changed[:, 9] += 1  # token 1 of block 2, tokens 8..11
    with torch.no_grad():
        moved = (node(x) - node(changed)).abs().amax((0, 2)) > 1e-9
        assert not moved[:9].any() and moved[9:].all()
        # a block's last token is in no decoder row: its own output comes from the prefix of the next block
        node.main.norm.weight.zero_()
        assert (node(x) - node(changed)).abs().amax((0, 2)).nonzero().flatten().tolist() == [9, 10]


# ------------------------------------------------------------------------------------------- the law
@ALL
def test_any_cut_and_rows_at_different_places(tree):
    model, x = build(tree), tokens(3)
    with torch.no_grad():
        full = model(x)
        for cuts in ([1] * T, [2, 1, 7, 19], [13, 16]):
            state, parts, start = model.init_state(3, T), [], 0
            for length in cuts:
                parts.append(model(x[:, start : start + length], state=state))
                start += length
            torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-9)
        state = model.init_state(3)
        model(x[:, :6], state=state)
        state.reset(torch.tensor([1]))  # row 1 begins again while the others go on
        y = torch.cat([model(x[:, 6:9], state=state), model(x[:, 9:], state=state)], 1)
        torch.testing.assert_close(y[[0, 2]], full[[0, 2], 6:], rtol=0, atol=1e-9)
        torch.testing.assert_close(y[1], model(x[1:2, 6:])[0], rtol=0, atol=1e-9)
        state.reorder(torch.tensor([2, 2, 0]))
        more = tokens(3, 5, seed=7)
        y = model(more, state=state)
        torch.testing.assert_close(y[2:], model(torch.cat([x[:1], more[2:]], 1))[:, T:], rtol=0, atol=1e-9)


@ALL
def test_packed_documents_are_alone(tree):
    model, x = build(tree).eval(), tokens()
    lengths = [[8, 1, 4, 16], [3, 12, 9, 5]]
    ids = torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor(n)) for n in lengths])
    alone = [torch.cat([model(part) for part in x[i : i + 1].split(n, 1)], 1) for i, n in enumerate(lengths)]
    outputs = {"packed": model(x, doc_ids=ids), "alone": torch.cat(alone)}
    torch.testing.assert_close(outputs["packed"], outputs["alone"], rtol=0, atol=1e-9)
    parameters = dict(model.named_parameters())
    grads = [torch.autograd.grad(y.square().sum(), parameters.values()) for y in outputs.values()]
    for name, packed, want in zip(parameters, *grads, strict=True):
        torch.testing.assert_close(packed, want, rtol=1e-8, atol=1e-8, msg=name)


def test_inner_states_move_on_at_boundaries_only():
    node, x = build(dynamic(ends=None)).layers[0], stream(2)
    with torch.no_grad():
        begins = node.chunker.boundaries(x, None, None) >= 0.5
        state = node.init_state(2)
        cache = state.chunker.main.children[0]
        for t in range(T):
            before = [k.clone() for k in cache.tensors()]
            node(x[:, t : t + 1], state=state)
            assert torch.equal(cache.length, begins[:, : t + 1].sum(1))
            if not begins[:, t].any():
                assert all(torch.equal(a, b) for a, b in zip(before, cache.tensors(), strict=True))
    assert 2 < cache.length[0] < T
    node = build(BLOCKS).layers[0]
    state = node.init_state(2, T)
    with torch.no_grad():
        for t in range(T):
            node(x[:, t : t + 1], state=state)
            assert state.chunker.main.children[0].length.tolist() == [(t + 1) // 4] * 2


def test_truncated_backpropagation_through_segments():
    model, x = build(TWO).train(), tokens()
    state = model.init_state(2)
    for part in x.split(10, 1):
        model(part, state=state).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------------------------------- costs
def counted(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def predicted(node, batch_size, seq_len, context_len=0, mode="prefill"):
    return [leaf.cost for leaf in node.leaves(batch_size, seq_len, context_len, mode)]


def test_dynamic_flops_are_those_counted_where_chunks_have_the_assumed_length():
    node = build(dynamic(ends=None, ratio=3, width=48)).layers[0]
    node.chunker.reset_parameters()
    for length in (27, 30):
        x = flips(3, length)
        assert sum(c.flops for c in predicted(node, 1, length)) == counted(lambda x=x: node(x))


def test_fixed_flops_and_state_are_exact():
    node = build(BLOCKS).layers[0]
    for length in (4, 15, 16, T):
        x = stream(2, length)
        assert sum(c.flops for c in predicted(node, 2, length)) == counted(lambda x=x: node(x))
        state = node.init_state(2, length)
        assert sum(c.state_bytes for c in predicted(node, 2, length)) == state.nbytes
        counted(lambda x=x, state=state: node(x, state=state))  # torch's counter refuses views of parameters
    state = sum(c.state_bytes for c in predicted(node, 2, 1, T - 1, "decode"))
    assert state == node.init_state(2, T).nbytes


@pytest.mark.parametrize("tree", [ONE, BLOCKS], ids=["dynamic", "fixed"])
def test_decoded_flops_are_those_counted_over_a_chunk(tree):
    node = build(tree).layers[0]
    if tree is ONE:
        node.encoder.body, node.chunker.ratio = None, 4
        node.chunker.reset_parameters()
    x, state = flips(4, 20), node.init_state(1, 20)
    with torch.no_grad():
        node(x[:, :16], state=state)
    steps = sum(counted(lambda t=t: node(x[:, t : t + 1], state=state)) for t in range(16, 20))
    assert steps == pytest.approx(4 * sum(c.flops for c in predicted(node, 1, 1, 17, "decode")), rel=0.05)


@KINDS
def test_parameters_are_counted_once_and_the_ratio_is_stated(tree):
    model = build(tree)
    report = zoo.estimate(model, batch_size=2, seq_len=24)
    assert report.params == sum(n.params for n in report.nodes) == sum(p.numel() for p in model.parameters())
    assert ("a dynamic chunk has 3 tokens on average" in report.assumptions) == (tree is not BLOCKS)


# ------------------------------------------------------------------------------------- configurations
def problem(*trunk):
    with pytest.raises(zoo.ConfigError) as error:
        zoo.load_config({"dim": DIM, "vocab_size": VOCAB, "trunk": list(trunk)})
    return str(error.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (dynamic(width=16), "at least the width of the stream around it, 32"),
        (dynamic([dynamic(width=40)], width=48), "at least the width of the stream around it, 48"),
        (fixed(length=5), "length=5 must divide"),
        (dynamic(ratio=1), "ratio"),
        ({"hierarchy": {"of": LAYER}}, "needs the field decoder"),
        ({"hierarchy": {"chunker": "dynamic_chunk", "of": LAYER, "decoder": LAYER}}, "did you mean dynamic_chunks"),
        ({"hierarchy": {"chunker": "mod", "of": LAYER, "decoder": LAYER}}, "unknown chunker"),
        (dynamic([{"swiglu": {}, "share": "f"}], ends=[{"swiglu": {}, "share": "f"}], width=48), "different widths"),
        (dynamic([{"attention": {"num_heads": 5}}], ends=LAYER, width=48), "does not divide dim=48"),
    ],
)
def test_mistakes(tree, message):
    assert message in problem(tree)


def test_a_hierarchy_goes_where_any_node_goes():
    """Inside repeat, loop and route, and beside other layers."""
    small = dynamic(LAYER, LAYER, ratio=2)
    for node in ({"repeat": 2, "of": small}, {"loop": {"steps": 2, "of": small}}, {"route": {"of": small}}):
        model, x = build(LAYER, node), tokens(2, 12)
        with torch.no_grad():
            state = model.init_state(2, 12)
            y = torch.cat([model(part, state=state) for part in x.split(5, 1)], 1)
            torch.testing.assert_close(y, model(x), rtol=0, atol=1e-9)
