"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, its shared memory fits there, and the usual variants spill nothing.

A process of its own compiles, because here the kernels are for the interpreter: ``python test_compiles.py OP ARCH`` prints a
line of JSON a variant. PYRLHF_COMPILE_ALL=1 compiles every variant of the tables instead of some that differ the most.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SHARED = {
    80: 99 << 10,
    90: 227 << 10,
}  # bytes a program may have: "small" tiles must fit the consumer GPUs beside sm_80
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
EVERYTHING = os.environ.get("PYRLHF_COMPILE_ALL") == "1"


@dataclass
class Variant:
    """A kernel as Triton would specialise it: arguments -> a type ("i32", with ":16" divisible by 16) or a constant's value."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int


def built(variant: Variant, arch: int) -> dict[str, Any]:
    """name, and bytes of shared memory a program, registers a thread, bytes of spills and of stack a thread."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    assert set(names) == set(variant.arguments), set(names) ^ set(variant.arguments)
    types = {n: a.partition(":")[0] for n, a in variant.arguments.items() if isinstance(a, str) and a not in ("ieee",)}
    source = ASTSource(
        variant.kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): a for n, a in variant.arguments.items() if n not in types},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in types if variant.arguments[n].endswith(":16")},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
        command = [str(ptxas), "-v", f"-arch=sm_{arch}{'a' if arch == 90 else ''}", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, told)
        assert found is not None, told
        return int(found.group(1))

    return {
        "name": variant.name,
        "shared": made.metadata.shared,
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores"),
        "stack": number(r"(\d+) bytes stack frame"),
    }


# -- the ops: each function gives the variants for one architecture -------------------------------------------------------------


def linear_logprob(arch: int) -> Iterator[Variant]:
    from pyrlhf.kernels import linear_logprob as kernels

    # "odd": a D that nothing divides, and a bias; "one": what Triton makes constants of, arguments that are 1
    sizes: dict[str, dict[str, Any]] = {
        "usual": {"n": "i32", "dim": "i32:16", "vocabulary": "i32:16", "splits": "i32", "count": "i32:16"},
        "odd": {"n": "i32", "dim": "i32", "vocabulary": "i32", "splits": "i32", "count": "i32"},
        "one": {"n": 1, "dim": 1, "vocabulary": 1, "splits": 1, "count": 1},
    }
    for dtype, bytes_each in DTYPES.items():
        tiles = kernels._TILES["large" if arch == 90 else "small", bytes_each]
        at = f"*{dtype}:16"
        float_pointers = ("partials", "logprob", "entropy", "lse", "grad_logprob", "grad_entropy", "sums")
        for size, numbers in sizes.items():
            if not EVERYTHING and (dtype, size) not in {
                ("bf16", "usual"),
                ("bf16", "odd"),
                ("fp32", "usual"),
                ("fp16", "one"),
            }:
                continue
            known: dict[str, Any] = {
                **dict.fromkeys(("hidden", "weight", "out", "grad"), at),
                **dict.fromkeys(float_pointers, "*fp32:16"),
                "bias": at if size == "odd" else None,
                "targets": "*i64:16",
                "faults": "*i32:16",
                "width": "i32:16",
                "first": "i32:16",
                "scale": "fp32",
                "ROWS": tiles.rows,
                "COLUMNS": tiles.columns,
                "DEPTH": tiles.depth,
                "GROUP": kernels._GROUP,
                "EVEN": size == "usual",
                "TMA": False,
                "FAULT": 6,
                "FIRST": False,
                "LAST": False,
                **numbers,
            }
            merging = {"ROWS": kernels._MERGED, "SPLITS": 1 if size == "one" else kernels._MAX_SPLITS}
            for kernel, own, warps, stages in (
                (kernels.forward_kernel, {}, tiles.warps, tiles.stages),
                (kernels.merge_kernel, merging, 4, 3),
                (kernels.grad_logits_kernel, {}, tiles.warps, tiles.stages),
                (kernels.grad_hidden_kernel, {}, tiles.warps, tiles.stages),
                (kernels.grad_hidden_kernel, {"LAST": True}, tiles.warps, tiles.stages),
            ):
                arguments = {n: {**known, **own}[n] for n in kernel.arg_names}
                if "TMA" in arguments and arch == 90 and bytes_each == 2 and size == "usual":
                    arguments |= descriptors(arguments, dtype, tiles)
                last = ", last" if own.get("LAST") else ""
                yield Variant(f"{kernel.__name__}, {dtype}, {size}{last}", kernel, arguments, warps, stages)


def descriptors(arguments: dict[str, Any], dtype: str, tiles: Any) -> dict[str, Any]:
    """The operands of a product as TMA takes them."""
    rows, columns, depth = tiles[:3]
    blocks = {"hidden": (rows, depth), "weight": (columns, depth)}
    if "hidden" not in arguments:
        blocks = {"grad": (rows, depth), "weight": (depth, columns)}
    return {"TMA": True, **{n: f"tensordesc<{dtype}[{a}, {b}]>" for n, (a, b) in blocks.items()}}


def attention(arch: int) -> Iterator[Variant]:
    from pyrlhf.kernels import attention as kernels

    size, numbers = "large" if arch == 90 else "small", ("tokens", "sequences", "blocks", "group")
    strides = [f"{x}_{what}" for x in "qkvg" for what in ("row", "head")]
    sizes: dict[str, dict[str, Any]] = {
        "even": {**dict.fromkeys(numbers, "i32"), **dict.fromkeys(strides, "i32:16")},
        "odd": {**dict.fromkeys(numbers, "i32"), **dict.fromkeys(strides, "i32")},
        "one": {**dict.fromkeys((*numbers, *strides), 1)},
    }
    masks: dict[str, dict[str, Any]] = {
        "causal": {"CAUSAL": True, "WINDOW": False, "prefix": None},
        "window": {"CAUSAL": True, "WINDOW": True, "prefix": None},
        "prefix": {"CAUSAL": True, "WINDOW": False, "prefix": "*i32:16"},
        "bidirectional": {"CAUSAL": False, "WINDOW": False, "prefix": None},
    }
    # those that most models run, and some that differ the most from them
    some = [("bf16", 64, "even", "causal"), ("bf16", 128, "even", "causal")]
    some += [("fp32", 64, "one", "window"), ("fp16", 33, "odd", "prefix")][: 1 if arch == 80 else 2]
    every = [(t, d, "even", m) for t in DTYPES for d in (16, 33, 64, 80, 96, 128, 256) for m in masks]
    every += [(t, d, s, m) for t in DTYPES for d in (33, 128) for s in ("odd", "one") for m in masks]
    for dtype, dim, sort, mask in every if EVERYTHING else some:
        width = max(16, 1 << (dim - 1).bit_length())
        passes = kernels._TILES[size, DTYPES[dtype], max(64, width)]
        known: dict[str, Any] = {
            **dict.fromkeys(("q", "k", "v", "grad_out", "out", "grad_q", "grad_k", "grad_v"), f"*{dtype}:16"),
            **dict.fromkeys(("lse", "rows_of"), "*fp32:16"),
            **dict.fromkeys(("cu_seqlens", "valid", "faults"), "*i32:16"),
            "window": "i32",
            "scale": "fp32",
            "DIM": dim,
            "WIDTH": width,
            "SEARCH": kernels._SEARCH,
            **{f"{x}_tiles": None for x in "qkvg"},
            "FAULT": 8,
            "ROWS": kernels._ROWS,
            **sizes[sort],
            **masks[mask],
        }
        own = kernels.Tiles(0, 0, 0, 4, 3)
        for kernel, tiles in (
            (kernels.check_kernel, own),
            (kernels.rows_kernel, own),
            (kernels.forward_kernel, passes.forward),
            (kernels.grad_queries_kernel, passes.by_query),
            (kernels.grad_keys_kernel, passes.by_key),
        ):
            if arch == 90 and DTYPES[dtype] == 2 and sort == "even" and dim == width:
                lines = {f"{x}_tiles": f"tensordesc<{dtype}[{tiles.keys}, {dim}]>" for x in "kv"}
                known |= dict.fromkeys(lines) if mask == "prefix" else lines
                known |= {f"{x}_tiles": f"tensordesc<{dtype}[{tiles.queries}, {dim}]>" for x in "qg"}
            arguments = {
                n: {**known, "QUERIES": tiles.queries, "KEYS": tiles.keys, "EDGE": tiles.edge}[n]
                for n in kernel.arg_names
            }
            usual = dtype != "fp32" and dim in (64, 128) and (sort, mask) == ("even", "causal")
            name = f"{kernel.__name__}, {dtype}, D {dim}, {mask}, {'usual' if usual else sort}"
            yield Variant(name, kernel, arguments, tiles.warps, tiles.stages)


OPS = {"linear_logprob": linear_logprob, "attention": attention}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("op", OPS)
def test_compiles(op: str, arch: int, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton (extra: test)")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, __file__, op, str(arch)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-4000:]
    variants = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(variants) >= 5
    for variant in variants:
        assert variant["shared"] <= SHARED[arch], variant
        if "usual" in variant["name"]:
            assert variant["spills"] == variant["stack"] == 0, variant


def main(op: str, arch: str) -> None:
    for variant in OPS[op](int(arch)):
        print(json.dumps(built(variant, int(arch))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
