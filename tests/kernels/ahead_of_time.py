"""Compiles the Triton kernels for GPUs that are not there, and reads from the binaries what they need. Run by test_triton_compile.py, in a process of its own.

    python -m tests.kernels.ahead_of_time '{"families": ["outer"], "architectures": [80, 90], "every": false}'

prints one JSON object a line: kernel, variant, config, architecture, sizes, registers, stack and shared memory in bytes, matrix (tensor-core instructions).
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adabatch.kernels.triton import affine, conv, embedding, gram, outer
from adabatch.kernels.triton.tuning import OPTIONS

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
# (type of the inputs, how products are rounded): bfloat16 first, which is what the default tests compile.
PRODUCTS = [("bf16", "tf32"), ("fp32", "ieee"), ("fp16", "tf32"), ("fp32", "tf32")]


def outer_variants():
    asked = {
        "grad, norms": {"GRAD": True, "SECOND": False, "NORMS": True, "WEIGHTED": False, "ATOMIC": True},
        "grad, norms, second": {"GRAD": True, "SECOND": True, "NORMS": True, "WEIGHTED": False, "ATOMIC": False},
        "weighted norms": {"GRAD": False, "SECOND": False, "NORMS": True, "WEIGHTED": True, "ATOMIC": False},
    }
    for kind, rounding in PRODUCTS:
        pointers = {"a_ptr": kind, "b_ptr": kind, "p_ptr": "fp32", "grad_ptr": "fp32", "second_ptr": "fp32", "norms_ptr": "fp32"}
        for name, flags in asked.items():
            constants = dict(flags, PRECISION=rounding, DTYPE=TYPES[kind], a_stride_i=1, b_stride_o=1, p_stride_i=1)
            tiles = flags["GRAD"] + flags["SECOND"] + flags["WEIGHTED"] + 1
            configs = functools.partial(outer.configurations, TYPES[kind], rounding, tiles)
            yield f"{name} {kind} {rounding}", outer.weight_grad_kernel, pointers, constants, configs


def gram_variants():
    for kind, rounding in PRODUCTS:
        configs = functools.partial(gram.configurations, TYPES[kind], rounding)
        for ids in (False, True):
            pointers = {"a_ptr": "i64" if ids else kind, "b_ptr": kind, "norms_ptr": "fp32"}
            constants = {
                "IDS": ids,
                "A_PRECISION": rounding,
                "B_PRECISION": rounding,
                "A_DTYPE": TYPES[kind],
                "B_DTYPE": TYPES[kind],
                "a_stride_i": 1,
                "b_stride_o": 1,
            }
            yield f"{'ids' if ids else 'activations'} {kind} {rounding}", gram.gram_kernel, pointers, constants, configs


def row_variants():
    for kind in TYPES:
        pointers = {"a_ptr": kind, "b_ptr": kind, "norms_ptr": "fp32"}
        yield kind, gram.row_norms_kernel, pointers, {"a_stride_i": 1, "b_stride_o": 1}, lambda: gram.ROWS


def affine_variants():
    statistics = {
        "layer norm": {"MEAN": 1, "RSTD": 1, "mean_stride_t": 1, "mean_stride_p": 0, "rstd_stride_t": 1, "rstd_stride_p": 0, "a_stride_p": 1, "b_stride_p": 1},
        "group norm": {"MEAN": 2, "RSTD": 2, "mean_stride_t": 0, "mean_stride_p": 1, "rstd_stride_t": 0, "rstd_stride_p": 1, "a_stride_t": 1, "b_stride_t": 1},
        "RMS norm": {"MEAN": 0, "RSTD": 1, "mean_stride_t": 0, "mean_stride_p": 0, "rstd_stride_t": 1, "rstd_stride_p": 0, "a_stride_p": 1, "b_stride_p": 1},
    }
    for kind in TYPES:
        pointers = {"a_ptr": kind, "b_ptr": kind, "mean_ptr": "fp32", "rstd_ptr": "fp32", "scale_ptr": "fp32", "shift_ptr": "fp32"}
        for name, constants in statistics.items():
            for squared in (True, False):
                yield f"{name} {kind} {squared}", affine.affine_kernel, pointers, dict(constants, SQUARED=squared), lambda: affine.AFFINE


def run_variants():
    for kind, rounding in PRODUCTS:
        pointers = {"ids_ptr": "i64", "order_ptr": "i64", "b_ptr": kind, "norms_ptr": "fp32"}
        constants = {"PRECISION": rounding, "DTYPE": TYPES[kind], "b_stride_d": 1}
        yield f"{kind} {rounding}", embedding.runs_kernel, pointers, constants, functools.partial(embedding.configurations, TYPES[kind], rounding)


def conv_variants():
    geometry = {"KH": 3, "KW": 3, "STRIDE_H": 1, "STRIDE_W": 1, "PAD_H": 1, "PAD_W": 1, "DILATION_H": 1, "DILATION_W": 1}
    for kind, rounding in PRODUCTS:
        pointers = {"a_ptr": kind, "b_ptr": kind, "grad_ptr": "fp32", "second_ptr": "fp32", "norms_ptr": "fp32"}
        for layout, contiguous in {"channels first": ("a_stride_w", "b_stride_w"), "channels last": ("a_stride_c", "b_stride_o")}.items():
            for second in (False, True):
                constants = dict(geometry, GRAD=True, SECOND=second, NORMS=True, ATOMIC=not second, PRECISION=rounding, DTYPE=TYPES[kind])
                constants |= dict.fromkeys(contiguous, 1)
                configs = functools.partial(conv.configurations, TYPES[kind], rounding)
                yield f"{layout}, second {second}, {kind} {rounding}", conv.conv_kernel, pointers, constants, configs


FAMILIES = {"outer": outer_variants, "gram": gram_variants, "rows": row_variants, "affine": affine_variants, "runs": run_variants, "conv": conv_variants}


def compile_kernel(kernel, pointers, constants, config, architecture, sizes="even"):
    """Stride 1 along the last dimension, aligned pointers, and

    sizes="even": sizes and strides that are multiples of 16, as in a real model;
    sizes="ones": all of them 1, which Triton compiles in, as a Python number instead of a value of the kernel;
    sizes="huge": strides beyond 2^31, and no multiples of anything.
    """
    constants = {**constants, **config.kwargs}
    if sizes == "ones":
        constants |= {name: 1 for name in kernel.arg_names if name not in constants and name not in pointers}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        number = "i64" if sizes == "huge" and "stride" in name else "i32"
        signature[name] = "constexpr" if name in constants else f"*{pointers[name]}" if name in pointers else number
        if name not in constants and (sizes == "even" or name in pointers):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(compiled):
    """What the binary says of itself; the compiler's own metadata has no spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", compiled.asm["ptx"]))
    return {"registers": found["reg"], "stack": found["stack"] + found["local"], "shared": compiled.metadata.shared, "matrix": matrix}


def main(families, architectures, every):
    """every: all types and configurations; else each kernel's first variant in its first configuration, and in its last for sizes of 1 and huge ones."""
    for family in families:
        variants = list(FAMILIES[family]())
        for variant, kernel, pointers, constants, configs in variants if every else variants[:1]:
            for architecture in architectures:
                written = configs(architecture // 10) if family == "outer" else configs()
                chosen = [(config, "even") for config in (written if every else written[:1])]
                for config, sizes in [*chosen, (written[-1], "ones"), (written[-1], "huge")]:
                    found = resources(compile_kernel(kernel, pointers, constants, config, architecture, sizes))
                    of = {"kernel": family, "variant": variant, "config": str(config), "architecture": architecture, "sizes": sizes}
                    print(json.dumps({**of, **found}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
