"""Memory and time of one forward and backward over a long row: whole, and chunk by chunk (`train.sequence_chunks`).

    python tools/chunk_memory.py --tokens 16384 --sizes 0 2048 512

Each case runs in a process of its own, which reports how far its peak memory lies above that of the model alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

LAYER = ["gated_deltanet", "swiglu"]
MODELS = {
    "llama": [{"repeat": 4, "of": [{"attention": {"num_heads": 4, "num_kv_heads": 2}}, "swiglu"]}],
    "mamba2": [{"repeat": 8, "of": ["mamba2"]}],
    "hybrid": [LAYER, LAYER, LAYER, [{"attention": {"num_heads": 4, "num_kv_heads": 2}}, "swiglu"]],
}


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, tokens: int, size: int, keep: float) -> dict[str, float]:
    """Of one case, in this process. size 0: the whole row."""
    import torch
    from torch.nn import functional as F

    import zoo
    from zoo.train.sequence_chunks import backward, cut, draw, new_state

    config = {"dim": 256, "vocab_size": 257, "trunk": MODELS[name]}
    torch.manual_seed(0)
    model, blank = zoo.build(config).train(), zoo.build(config, device="meta")
    row = torch.randint(257, (1, tokens + 1))

    def loss_of(where: slice, state=None, wanted: bool = True):
        inputs = row[:, :-1][:, where]
        if not wanted:
            return model.hidden(inputs, state)
        return F.cross_entropy(model(inputs, state).flatten(0, 1), row[:, 1:][:, where].flatten(), reduction="sum")

    def step(length: int, size: int) -> float:
        if not size:
            loss = loss_of(slice(length))
            loss.backward()
        else:
            chunks = cut(length, size)
            loss = backward(loss_of, new_state(blank, 1, length, row.device), chunks, draw(len(chunks), keep), keep)
        return loss.item()

    step(64, size and 32)  # everything is loaded, gradients are there
    before, start = peak(), time.perf_counter()
    loss = step(tokens, size)
    return {"loss": loss / tokens, "seconds": time.perf_counter() - start, "mib": peak() - before}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    ask.add_argument("--tokens", type=int, default=16384)
    ask.add_argument("--sizes", type=int, nargs="+", default=[0, 2048, 512], help="0: the whole row")
    ask.add_argument("--keep", type=float, default=1.0)
    ask.add_argument("--one", action="store_true", help="the first model and size, in this process, as JSON")
    given = ask.parse_args()
    if given.one:
        print(json.dumps(measure(given.models[0], given.tokens, given.sizes[0], given.keep if given.sizes[0] else 1.0)))
        return
    print("| model | chunk | MiB above the model | seconds | loss |\n| --- | ---: | ---: | ---: | ---: |")
    for name in given.models:
        for size in given.sizes:
            case = ["--one", "--models", name, "--tokens", given.tokens, "--sizes", size, "--keep", given.keep]
            command = [sys.executable, __file__, *map(str, case)]
            found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            cells = f"{found['mib']:.0f} | {found['seconds']:.1f} | {found['loss']:.5f}"
            print(f"| {name} | {size or 'whole row'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
