"""What each op is timed on: one entry a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zoo.bench import problems
from zoo.bench.problems import Draw, Problem

HF, FLA, SSM, SDPA = (f"zoo.bench.peers.{name}:" for name in ("transformers", "fla", "mamba_ssm", "sdpa"))


@dataclass(frozen=True)
class Case:
    """A call of an op worth timing. peers: name -> "module:function"; such a function gets the inputs and returns
    what to call and with what, so that it may change layouts before the clock starts."""

    op: str
    name: str
    make: Callable[[Draw, int, bool], Problem]
    seq: int = 2048
    backward: bool = True
    step: bool = False  # the op keeps a state: time one token too
    linear: bool = False  # its cost is linear in the length: `zoo bench scaling` proves it
    peers: tuple[tuple[str, str], ...] = ()
    step_peers: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.op}, {self.name}" if self.name else self.op


_FLA_GLA = (("fla chunk_gla", FLA + "chunk_gla"),)
_FLA_SIMPLE = (("fla chunk_simple_gla", FLA + "chunk_simple_gla"),)
CASES: tuple[Case, ...] = (
    Case(
        "linear_attention", "constant decay", problems.linear_attention("constant", 8, 8), step=True, linear=True,
        peers=_FLA_SIMPLE,
    ),
    Case(
        "linear_attention", "decay per head", problems.linear_attention("head", 16, 1, key_dim=128), step=True,
        linear=True, peers=(("transformers mamba2_chunk_scan", HF + "mamba2_chunk_scan"), *_FLA_SIMPLE),
        step_peers=(("transformers mamba2_selective_state_update", HF + "mamba2_step"),),
    ),
    Case(
        "linear_attention", "decay per channel", problems.linear_attention("channel", 8, 8), step=True, linear=True,
        peers=_FLA_GLA,
    ),
    Case(
        "delta_rule", "decay per head", problems.delta_rule(False), step=True, linear=True,
        peers=(
            ("transformers torch_chunk_gated_delta_rule", HF + "gated_delta_rule"),
            ("fla chunk_gated_delta_rule", FLA + "chunk_gated_delta_rule"),
        ),
        step_peers=(("transformers torch_recurrent_gated_delta_rule", HF + "gated_delta_rule_step"),),
    ),
    Case(
        "delta_rule", "decay per channel", problems.delta_rule(True), step=True, linear=True,
        peers=(
            ("transformers chunk_kimi_delta_attention", HF + "kimi_delta_rule"),
            ("fla chunk_kda", FLA + "chunk_kda"),
        ),
        step_peers=(("transformers recurrent_kimi_delta_attention", HF + "kimi_delta_rule_step"),),
    ),
    Case("dplr", "", problems.dplr, step=True, linear=True),
    Case(
        "diagonal_scan", "", problems.diagonal_scan, step=True, linear=True,
        peers=(("transformers RecurrentGemma scan", HF + "rglru_scan"),),
        step_peers=(("transformers RecurrentGemma scan", HF + "rglru_scan_step"),),
    ),
    Case(
        "selective_scan", "", problems.selective_scan, step=True, linear=True,
        peers=(
            ("transformers mamba_selective_scan", HF + "mamba_scan"),
            ("mamba_ssm selective_scan_fn", SSM + "selective_scan_fn"),
        ),
        step_peers=(("transformers mamba_selective_state_update", HF + "mamba_step"),),
    ),
    Case(
        "short_conv", "", problems.short_conv, step=True, linear=True,
        peers=(("transformers causal_conv1d_fn", HF + "causal_conv1d"),),
    ),
    Case(
        "attention", "causal", problems.attention(8), step=True,
        peers=(("torch SDPA", SDPA + "causal"),), step_peers=(("torch SDPA", SDPA + "step"),),
    ),
    Case(
        "attention", "two key heads", problems.attention(2), step=True,
        peers=(("torch SDPA", SDPA + "causal"),), step_peers=(("torch SDPA", SDPA + "step"),),
    ),
    Case("attention", "window 256", problems.attention(8, window=256)),
    Case("rope", "", problems.rope, peers=(("transformers apply_rotary_pos_emb", HF + "rotary"),)),
    Case("sparse_attention", "25 % of 128x128 blocks per head", problems.sparse_attention(128), seq=4096, step=True),
    Case("sparse_attention", "25 % of blocks of 64 per token", problems.sparse_attention(1), seq=4096, step=True),
    Case("block_scores", "", problems.block_scores, seq=4096),
    Case("select", "top 8 blocks", problems.select, seq=4096, backward=False),
    Case("select_blocks", "top 8 blocks", problems.select_blocks, seq=4096, backward=False),
    Case("pool_blocks", "mean of 64", problems.pool_blocks, seq=4096),
    Case("prefix_topk", "64 of each prefix", problems.prefix_topk, seq=4096, backward=False),
    Case("merge_lse", "two sets", problems.merge_lse),
    Case("linear", "512 to 2048", problems.linear, step=True),
    Case("grouped_mm", "8 experts, 2 a token", problems.grouped_mm),
    Case("block_linear", "Monarch, 32x32 blocks", problems.monarch),
    Case("block_linear", "BLAST, 8x8 blocks of rank 128", problems.blast),
    Case("product_key_lookup", "16 of 128x128 keys, 4 heads", problems.product_key),
)  # fmt: skip


def of(op: str) -> tuple[Case, ...]:
    """The cases of an op."""
    return tuple(case for case in CASES if case.op == op)
