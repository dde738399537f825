"""Compiles the Triton kernels for GPUs that need not be present, and reads from the binaries what
they need. Run by test_ahead_of_time.py, in a process that does not interpret.

    python -m tests.kernels.ahead_of_time '{"architectures": [80, 90], "every": false}'

prints one JSON object a line: kernel, variant, config, architecture, sizes, registers, stack and
shared memory in bytes, matrix (tensor-core instructions).
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
# (type of the inputs, how products are rounded): bfloat16 first, which the default tests compile.
PRODUCTS = [("bf16", "tf32"), ("fp32", "ieee"), ("fp16", "tf32"), ("fp32", "tf32")]


def outer_variants():
    wanted = {"grad, norms": "GN", "grad, norms, second": "GSN", "weighted norms": "NW"}
    for kind, rounding in PRODUCTS:
        for name, letters in wanted.items():
            names = ("GRAD", "SECOND", "NORMS", "WEIGHTED")
            flags = {each: each[0] in letters for each in names} | {"ATOMIC": letters == "GN"}
            strides = {"a_stride_i": 1, "b_stride_o": 1, "p_stride_i": 1}
            constants = {**flags, **strides, "PRECISION": rounding, "DTYPE": TYPES[kind]}
            tiles = 1 + sum(each in "GSW" for each in letters)
            configs = functools.partial(outer.configurations, TYPES[kind], rounding, tiles)
            pointers = dict(a_ptr=kind, b_ptr=kind, **floats("p", "grad", "second", "norms"))
            title = f"{name} {kind} {rounding}"
            yield title, outer.weight_grad_kernel, pointers, constants, configs


def gram_variants():
    for kind, rounding in PRODUCTS:
        configs = gram.configurations(TYPES[kind], rounding)
        constants = dict.fromkeys(("A_PRECISION", "B_PRECISION"), rounding)
        constants |= dict.fromkeys(("A_DTYPE", "B_DTYPE"), TYPES[kind])
        constants |= dict.fromkeys(("a_stride_i", "b_stride_o"), 1)
        for ids in (False, True):
            pointers = dict(a_ptr="i64" if ids else kind, b_ptr=kind, **floats("norms"))
            title = f"{'ids' if ids else 'activations'} {kind} {rounding}"
            yield title, gram.gram_kernel, pointers, {**constants, "IDS": ids}, configs


def row_variants():
    for kind in TYPES:
        pointers = dict(a_ptr=kind, b_ptr=kind, **floats("norms"))
        constants = {"a_stride_i": 1, "b_stride_o": 1}
        yield kind, gram.row_norms_kernel, pointers, constants, gram.ROWS


def affine_variants():
    per_position = {"mean_stride_t": 1, "mean_stride_p": 0, "rstd_stride_t": 1, "rstd_stride_p": 0}
    per_element = {"mean_stride_t": 0, "mean_stride_p": 1, "rstd_stride_t": 0, "rstd_stride_p": 1}
    channels_last, first = {"a_stride_p": 1, "b_stride_p": 1}, {"a_stride_t": 1, "b_stride_t": 1}
    rms = {**per_position, "mean_stride_t": 0, **channels_last}
    statistics = {
        "layer norm": {"MEAN": 1, "RSTD": 1, **per_position, **channels_last},
        "group norm": {"MEAN": 2, "RSTD": 2, **per_element, **first},
        "RMS norm": {"MEAN": 0, "RSTD": 1, **rms},
    }
    for kind in TYPES:
        pointers = dict(a_ptr=kind, b_ptr=kind, **floats("mean", "rstd", "scale", "shift"))
        for name, constants in statistics.items():
            for squared in (True, False):
                constants = {**constants, "SQUARED": squared}
                title = f"{name} {kind} {squared}"
                yield title, affine.affine_kernel, pointers, constants, affine.AFFINE


def run_variants():
    for kind, rounding in PRODUCTS:
        pointers = dict(ids_ptr="i64", order_ptr="i64", b_ptr=kind, **floats("norms"))
        constants = {"PRECISION": rounding, "DTYPE": TYPES[kind], "b_stride_d": 1}
        configs = embedding.configurations(TYPES[kind], rounding)
        yield f"{kind} {rounding}", embedding.runs_kernel, pointers, constants, configs


def conv_variants():
    geometry = dict.fromkeys(("STRIDE_H", "STRIDE_W", "PAD_H", "PAD_W"), 1)
    geometry |= {"KH": 3, "KW": 3, "DILATION_H": 1, "DILATION_W": 1}
    first, last = ("a_stride_w", "b_stride_w"), ("a_stride_c", "b_stride_o")
    for kind, rounding in PRODUCTS:
        pointers = dict(a_ptr=kind, b_ptr=kind, **floats("grad", "second", "norms"))
        configs = conv.configurations(TYPES[kind], rounding)
        for layout, contiguous in {"channels first": first, "channels last": last}.items():
            for second in (False, True):
                flags = {"GRAD": True, "SECOND": second, "NORMS": True, "ATOMIC": not second}
                constants = {**geometry, **flags, "PRECISION": rounding, "DTYPE": TYPES[kind]}
                constants |= dict.fromkeys(contiguous, 1)
                title = f"{layout}, second {second}, {kind} {rounding}"
                yield title, conv.conv_kernel, pointers, constants, configs


def floats(*names):
    return {f"{name}_ptr": "fp32" for name in names}


FAMILIES = {
    "outer": outer_variants, "gram": gram_variants, "rows": row_variants,
    "affine": affine_variants, "runs": run_variants, "conv": conv_variants,
}


def compile_kernel(kernel, pointers, constants, config, architecture, sizes="even"):
    """Stride 1 along the last dimension, aligned pointers, and

    sizes="even": sizes and strides that are multiples of 16, as in a real model;
    sizes="ones": all of them 1, which Triton compiles in, as a Python number;
    sizes="huge": strides beyond 2^31, and no multiples of anything.
    """
    constants = {**constants, **config.kwargs}
    if sizes == "ones":
        free = set(kernel.arg_names) - set(constants) - set(pointers)
        constants |= dict.fromkeys(free, 1)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        number = "i64" if sizes == "huge" and "stride" in name else "i32"
        signature[name] = f"*{pointers[name]}" if name in pointers else number
        if name in constants:
            signature[name] = "constexpr"
        if name not in constants and (sizes == "even" or name in pointers):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(compiled):
    """What the binary says of itself; the compiler's metadata has no spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared,
        "matrix": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", compiled.asm["ptx"])),
    }


def main(architectures, every, families=tuple(FAMILIES)):
    """every: all types and configurations; else each kernel's first variant in its first
    configuration, and in its last for sizes of 1 and huge ones."""
    for family in families:
        variants = list(FAMILIES[family]())
        for variant, kernel, pointers, constants, configs in variants if every else variants[:1]:
            for architecture in architectures:
                written = configs(architecture // 10) if callable(configs) else configs
                chosen = [(config, "even") for config in (written if every else written[:1])]
                for config, sizes in [*chosen, (written[-1], "ones"), (written[-1], "huge")]:
                    target = (config, architecture, sizes)
                    binary = {
                        "kernel": family, "variant": variant, "config": str(config),
                        "architecture": architecture, "sizes": sizes,
                        **resources(compile_kernel(kernel, pointers, constants, *target)),
                    }
                    print(json.dumps(binary), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
