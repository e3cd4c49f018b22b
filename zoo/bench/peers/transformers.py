"""Hugging Face transformers: its plain torch scans, and its layers with our weights in them.

transformers binds fla and mamba-ssm in place of its own functions where they are importable; `inspect.unwrap` gives
its own ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.bench.peers import Peer
from zoo.kernels.libraries import problem as import_problem

Call = tuple[Callable[..., Any], list[Tensor]]
SDPA: dict[str, Any] = {"attn_implementation": "sdpa"}


def problem(device: str) -> str | None:
    """Why transformers cannot be raced, or None."""
    why = import_problem("transformers", "transformers", "5.0")
    if why is None:
        from transformers.utils import logging

        logging.set_verbosity_error()  # it advises to install kernels that the table already speaks of
    return why


def _own(fn: Callable) -> Callable:
    return inspect.unwrap(fn)


# ------------------------------------------------------------------------------------------------------- scans
def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Call:
    """Qwen3-Next's chunked form."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    fn = _own(torch_chunk_gated_delta_rule)
    return lambda q, k, v, beta, g: fn(q, k, v, g=g, beta=beta)[0], [q, k, v, beta, g]


def gated_delta_rule_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> Call:
    """Qwen3-Next's recurrence."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    return _step_with(_own(torch_recurrent_gated_delta_rule)), [q, k, v, beta, g, state]


def kimi_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor) -> Call:
    """Kimi Linear's chunked form."""
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    fn = _own(chunk_kimi_delta_attention)
    return lambda q, k, v, beta, g: fn(q, k, v, g, beta)[0], [q, k, v, beta, g]


def kimi_delta_rule_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> Call:
    """Kimi Linear's recurrence."""
    from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention

    return _step_with(_own(recurrent_kimi_delta_attention)), [q, k, v, beta, g, state]


def _step_with(fn: Callable) -> Callable:
    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> Any:
        return fn(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)

    return run


def rglru_scan(log_decay: Tensor, x: Tensor, state: Tensor | None = None) -> Call:
    """RecurrentGemma's scan. It takes the decay itself."""
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    module = RecurrentGemmaRglru.__new__(RecurrentGemmaRglru)  # the scan reads nothing of the module
    torch.nn.Module.__init__(module)
    no_reset = torch.zeros(*x.shape[:2], 1, dtype=torch.bool, device=x.device)

    def run(log_decay: Tensor, x: Tensor, state: Tensor | None = None) -> Any:
        h, last = module._rnn_scan(x, log_decay.exp(), no_reset, state)
        return h if state is None else (h, last)

    return run, [log_decay, x] + ([] if state is None else [state])


rglru_scan_step = rglru_scan


def mamba_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Call:
    """Mamba's loop over tokens; compiled, an associative scan."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    fn = _own(mamba_selective_scan)

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
        return fn(u, delta, A, B, C, use_associative_scan=True).transpose(1, 2)

    return run, [u, delta, A, B, C]


def mamba_step(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Call:
    """Mamba's step; it overwrites the state."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_state_update

    fn = _own(mamba_selective_state_update)

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Any:
        return fn(state, u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0])[:, None], state

    return run, [u, delta, A, B, C, state]


def mamba2_chunk_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Call:
    """Mamba-2's scan, h = exp(dt A) h + dt B x^T: with A = -1 and dt = -g it is linear attention of x = v / dt."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan as scan

    fn = _own(scan)
    A = torch.full((v.shape[2],), -1.0, device=v.device)
    dt = -g

    def run(q: Tensor, k: Tensor, x: Tensor, dt: Tensor) -> Tensor:
        return fn(x, dt, A, k, q, 256)

    return run, [q, k, (v / dt[..., None]).to(v.dtype), dt]


def mamba2_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> Call:
    """Mamba-2's step; it overwrites the state, [B, H, P, N]."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update

    fn = _own(mamba2_selective_state_update)
    P, N = v.shape[-1], k.shape[-1]
    A = torch.full((v.shape[2], P, N), -1.0, device=v.device)
    dt = -g[:, 0, :, None].expand(-1, -1, P)

    def run(q: Tensor, k: Tensor, x: Tensor, dt: Tensor, state: Tensor) -> Any:
        y = fn(state, x[:, 0], dt, A, k[:, 0], q[:, 0])
        return y[:, None].to(x.dtype), state.transpose(-1, -2)

    return run, [q, k, (v / -g[..., None]).to(v.dtype), dt, state.transpose(-1, -2).contiguous()]


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Call:
    """The convolution of its state-space layers, channels first inside."""
    from transformers.models.mamba.modeling_mamba import causal_conv1d_fn

    fn = _own(causal_conv1d_fn)
    return lambda x, w, b: fn(x.transpose(1, 2), w, b, activation="silu").transpose(1, 2), [x, weight, bias]


def rotary(x: Tensor) -> Call:
    """Llama's rotation, of x alone, with the angles already there."""
    from transformers.models.llama.modeling_llama import rotate_half

    B, T, _, D = x.shape
    frequencies = 10000.0 ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float64) / D)
    angles = (torch.arange(T, device=x.device)[:, None] * frequencies).repeat(1, 2)
    cos, sin = (f(angles).to(x.dtype).expand(B, T, D).unsqueeze(2) for f in (torch.cos, torch.sin))
    return lambda x: x * cos + rotate_half(x) * sin, [x]


# ------------------------------------------------------------------------------------------------------ layers
# Each takes our block, the number of positions that will be asked for, and changes to the configuration.


def _loaded(theirs: nn.Module, ours: nn.Module, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """Their layer with our weights, every parameter of it."""
    weights = dict(ours.state_dict()) if weights is None else weights
    missing = theirs.load_state_dict(weights, strict=False).missing_keys
    names = {name for name, _ in theirs.named_parameters()}
    if left := sorted(names.intersection(missing)):
        raise ValueError(f"no weights of ours for {', '.join(left)}")
    like = next(ours.parameters())
    return theirs.to(like.device, like.dtype).eval()


def _state_space(module: Any, x: Tensor, cache: Any, start: int) -> Tensor:
    return module(x, cache_params=cache)


def _dynamic(config: Any) -> Callable[[], Any]:
    from transformers import DynamicCache

    return lambda: DynamicCache(config=config)


def layer_mamba(ours: Any, positions: int, changes: dict[str, Any]) -> Peer:
    """MambaMixer."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(
        hidden_size=ours.dim, state_size=ours.state_dim, conv_kernel=ours.conv_size, time_step_rank=ours.dt_rank,
        num_hidden_layers=1, **changes,
    )  # fmt: skip
    return Peer(_loaded(MambaMixer(config, 0), ours), _state_space, _dynamic(config))


def layer_mamba2(ours: Any, positions: int, changes: dict[str, Any]) -> Peer:
    """Mamba2Mixer."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=ours.dim, num_heads=ours.num_heads, head_dim=ours.head_dim, state_size=ours.state_dim,
        n_groups=ours.num_groups, num_hidden_layers=1, **changes,
    )  # fmt: skip
    return Peer(_loaded(Mamba2Mixer(config, 0), ours), _state_space, _dynamic(config))


def layer_gated_deltanet(ours: Any, positions: int, changes: dict[str, Any]) -> Peer:
    """Qwen3NextGatedDeltaNet. Rows of its projections go head by head: q, k, v, z and b, a."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    H, D = ours.num_heads, ours.head_dim
    config = Qwen3NextConfig(
        hidden_size=ours.dim, linear_num_value_heads=ours.num_v_heads, linear_num_key_heads=H, linear_key_head_dim=D,
        linear_value_head_dim=ours.value_dim, linear_conv_kernel_dim=ours.conv_size, hidden_act="silu",
        rms_norm_eps=1e-6, num_hidden_layers=1, layer_types=["linear_attention"], **changes,
    )  # fmt: skip
    w = ours.state_dict()

    def by_head(*names: str) -> Tensor:
        parts = [w[f"{name}_proj.weight"].unflatten(0, (H, -1)) for name in names]
        return torch.cat(parts, 1).flatten(0, 1)

    weights = {
        "in_proj_qkvz.weight": by_head("q", "k", "v", "g"),
        "in_proj_ba.weight": by_head("b", "a"),
        "conv1d.weight": torch.cat([w[f"{name}_conv1d.weight"] for name in "qkv"]),
        "norm.weight": w["o_norm.weight"],
        "out_proj.weight": w["o_proj.weight"],
        "A_log": w["A_log"],
        "dt_bias": w["dt_bias"],
    }
    return Peer(_loaded(Qwen3NextGatedDeltaNet(config, 0), ours, weights), _state_space, _dynamic(config))


def layer_kda(ours: Any, positions: int, changes: dict[str, Any]) -> Peer:
    """KimiLinearDeltaAttention."""
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(
        hidden_size=ours.dim, linear_num_heads=ours.num_heads, linear_head_dim=ours.key_dim,
        linear_conv_kernel_dim=ours.conv_size, num_hidden_layers=1, layer_types=["linear_attention"], **changes,
    )  # fmt: skip
    return Peer(_loaded(KimiLinearDeltaAttention(config, 0), ours), _state_space, _dynamic(config))


def _rotary(embedding: nn.Module, ours: nn.Module, positions: int) -> Callable[..., Tensor]:
    """Attention with the angles of all positions computed before the clock starts, as a model does once for all
    its layers."""
    like = next(ours.parameters())
    index = torch.arange(positions, device=like.device)[None]
    cos, sin = embedding.to(like.device)(like.new_zeros(1, positions, 1), index)

    def call(module: Any, x: Tensor, cache: Any, start: int) -> Tensor:
        angles = tuple(a[:, start : start + x.shape[1]] for a in (cos, sin))
        return module(x, angles, None, past_key_values=cache)[0]

    return call


def layer_attention(ours: Any, positions: int, changes: dict[str, Any]) -> Peer:
    """LlamaAttention on SDPA."""
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as m

    config = LlamaConfig(
        hidden_size=ours.dim, num_attention_heads=ours.num_heads, num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.head_dim, num_hidden_layers=1, max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **SDPA, **changes,
    )  # fmt: skip
    call = _rotary(m.LlamaRotaryEmbedding(config), ours, positions)
    return Peer(_loaded(m.LlamaAttention(config, 0), ours), call, _dynamic(config))


def layer_mla(ours: Any, positions: int, changes: dict[str, Any]) -> Peer:
    """DeepseekV3Attention on SDPA."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m

    config = DeepseekV3Config(
        hidden_size=ours.dim, num_attention_heads=ours.num_heads, num_key_value_heads=ours.num_heads,
        q_lora_rank=ours.q_lora_rank, kv_lora_rank=ours.kv_lora_rank, qk_nope_head_dim=ours.nope,
        qk_rope_head_dim=ours.rope_dim, v_head_dim=ours.v_head_dim, num_hidden_layers=1, attention_bias=False,
        max_position_embeddings=positions, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **SDPA,
        **changes,
    )  # fmt: skip
    call = _rotary(m.DeepseekV3RotaryEmbedding(config), ours, positions)
    return Peer(_loaded(m.DeepseekV3Attention(config, 0), ours), call, _dynamic(config))


def layer_lightning(ours: Any, positions: int, changes: dict[str, Any]) -> Peer:
    """MiniMaxLightningAttention."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=ours.dim, num_attention_heads=ours.num_heads, head_dim=ours.head_dim, num_hidden_layers=1,
        hidden_act="silu", layer_types=["linear_attention"], **changes,
    )  # fmt: skip
    return Peer(
        _loaded(MiniMaxLightningAttention(config, 0), ours),
        lambda module, x, cache, start: module(x, None, None, past_key_values=cache)[0],
        MiniMaxCache,
    )


def layer_moe(ours: Any, positions: int, changes: dict[str, Any]) -> Peer:
    """MixtralSparseMoeBlock, its experts by torch's grouped product unless told otherwise."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=ours.dim, intermediate_size=ours.hidden_dim, num_local_experts=ours.num_experts,
        num_experts_per_tok=ours.gate.top_k, num_hidden_layers=1,
        **{"experts_implementation": "grouped_mm", **changes},
    )  # fmt: skip

    def call(module: Any, x: Tensor, cache: Any, start: int) -> Tensor:
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    return Peer(_loaded(MixtralSparseMoeBlock(config), ours), call, lambda: None)


def layer_rg_lru(ours: Any, positions: int, changes: dict[str, Any]) -> Peer:
    """RecurrentGemmaRecurrentBlock. It keeps its state in itself; the cache holds that state between the calls."""
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    config = RecurrentGemmaConfig(
        hidden_size=ours.dim, lru_width=ours.width, num_attention_heads=ours.num_heads, conv1d_width=ours.conv_size,
        num_hidden_layers=1, **changes,
    )  # fmt: skip
    theirs: Any = _loaded(RecurrentGemmaRecurrentBlock(config, 0), ours)
    like = next(ours.parameters())
    index = torch.arange(positions, device=like.device)[None]

    def call(module: Any, x: Tensor, cache: Any, start: int) -> Tensor:
        if cache is not None:
            theirs.conv1d_state, theirs.rg_lru.recurrent_states = cache["conv"], cache["h"]
        y = module(x, index[:, start : start + x.shape[1]], None, use_cache=cache is not None)[0]
        if cache is not None:
            cache["conv"], cache["h"] = theirs.conv1d_state, theirs.rg_lru.recurrent_states
        return y

    def cache() -> dict[str, Tensor]:
        return {
            "conv": like.new_zeros(1, ours.width, ours.conv_size - 1),
            "h": like.new_zeros(1, ours.width, dtype=torch.float32),
        }

    return Peer(theirs, call, cache)
