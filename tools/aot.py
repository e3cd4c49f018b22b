"""Compile every Triton kernel for GPUs that are not here, and keep what the compiler says about it.

    python tools/aot.py                     # rewrites tests/kernels/aot/triton-<version>.json
    python tools/aot.py --check             # compiles again and compares with the committed table
    python tools/aot.py --triton DIR        # another Triton: pip install --target DIR triton==3.6.0
    python tools/aot.py --op delta_rule     # only some ops

The launch functions of each op run on meta tensors (`launches()` of its triton.py) with a driver that compiles but
never launches, so what is compiled is what a GPU would be given. Every configuration is compiled, not only the first.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# 90-mma: what Hopper runs where wgmma is assembled wrongly (zoo/kernels/gpu.py)
TARGETS = ("80", "90", "90-mma", "100")
TABLES = Path(__file__).resolve().parents[1] / "tests" / "kernels" / "aot"


class CompileOnly:
    """A driver for a GPU that is not here."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        self.name, self.target = target, GPUTarget("cuda", int(target.split("-")[0]), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return TARGETS.index(self.name)  # Triton keeps compiled kernels per device number

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, name):
        return name

    @staticmethod
    def is_active():
        return True


def figures(compiled) -> dict[str, int | str]:
    """Registers, spill instructions, shared memory and matrix instructions of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True
        )
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    pattern = r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)"
    count = collections.Counter(name.split(".")[0] for name in re.findall(pattern, sass, re.M))
    ptx = compiled.asm["ptx"]
    matrix = {
        name: len(re.findall(name.replace(".", r"\."), ptx)) for name in ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
    }
    registers = re.search(r"\bREG:(\d+)", usage.stdout)
    return {
        "registers": int(registers[1]) if registers else -1,
        "spill_stores": count["STL"],
        "spill_loads": count["LDL"],
        "shared": compiled.metadata.shared,
        "num_warps": compiled.metadata.num_warps,
        "products": len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"])),
        "matrix": sum(matrix.values()),
        "matrix_kind": next((name for name, n in matrix.items() if n), "none"),
        "half": int("bf16" in compiled.asm["ttir"]),
    }


def compile_op(op: str, target: str) -> dict[str, dict]:
    """Figures of every kernel that the op's launches reach, by "label/kernel/config"."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from zoo.kernels import gpu

    driver.set_active(CompileOnly(target))
    os.environ.pop("DISABLE_MMA_V3", None)
    if target.endswith("-mma"):
        os.environ["DISABLE_MMA_V3"] = "1"
    module = importlib.import_module(f"zoo.kernels.{op}.triton")
    found: dict[str, dict] = {}
    label = ""
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        name = f"{op}/{label}/{self.fn.__name__}"
        # forcing one kernel's options launches the others of the same thunk as before: each is kept once
        if name not in found and ("[" not in label or label.split("/")[-1].split("[")[0] == self.fn.__name__):
            found[name] = figures(kernel)
            print(f"  sm_{target} {name} {found[name]}", file=sys.stderr)
        return kernel

    JITFunction.run = compile_only
    try:
        for name, thunk in module.launches():
            gpu.seen.clear()
            label = name
            thunk()
            for kernel, configs in list(gpu.seen.items()):
                for number, config in enumerate(configs[1:], 1):
                    gpu.forced[kernel] = config
                    label = f"{name}/{kernel}[{number}]"
                    thunk()
                gpu.forced.clear()
    finally:
        JITFunction.run = launch
    return found


def problems(table: dict[str, dict[str, dict]]) -> list[str]:
    """What no kernel may show, whatever the committed figures."""
    from zoo.kernels.gpu import SHARED_MEMORY

    out = []
    for arch, rows in table.items():
        for name, row in rows.items():
            where = f"sm_{arch} {name}"
            if row["shared"] > SHARED_MEMORY[int(arch.split("-")[0])]:
                out.append(f"{where}: {row['shared']} bytes of shared memory cannot be launched")
            if "backward" not in name and row["spill_stores"] + row["spill_loads"]:
                out.append(
                    f"{where}: a forward kernel spills ({row['spill_stores']} stores, {row['spill_loads']} loads)"
                )
            if row["products"] and row["half"] and not row["matrix"]:
                out.append(f"{where}: a product without tensor-core instructions")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--triton", type=Path)
    parser.add_argument("--op", action="append")
    parser.add_argument("--arch", choices=TARGETS, action="append")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    if args.triton:
        sys.path.insert(0, str(args.triton))
    import triton

    from zoo.kernels.dispatch import ops, rows

    names = args.op or [op for op in ops() if any(row.backend == "triton" for row in rows(op))]
    table = {a: {k: v for op in names for k, v in compile_op(op, a).items()} for a in args.arch or TARGETS}
    path = TABLES / f"triton-{triton.__version__}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    complaints = problems(table)
    if args.check:
        for arch, found in table.items():
            known = {k: v for k, v in kept.get(arch, {}).items() if k.split("/")[0] in names}
            for name in sorted(known.keys() | found.keys()):
                if known.get(name) != found.get(name):
                    complaints.append(f"sm_{arch} {name}: committed {known.get(name)}, compiled {found.get(name)}")
    else:
        for arch, found in table.items():
            others = {k: v for k, v in kept.get(arch, {}).items() if k.split("/")[0] not in names}
            kept[arch] = dict(sorted((others | found).items()))
        TABLES.mkdir(exist_ok=True)
        path.write_text(json.dumps(kept, indent=1) + "\n")
        print(path)
    print(*complaints, sep="\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
