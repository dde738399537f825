"""What measuring costs on shapes that nobody tuned to: random convolutional networks, transformers
and MLPs, drawn by a seed from the ranges below.

    python examples/benchmarks/sweep.py              # 15, 15 and 10 models
    python examples/benchmarks/sweep.py --layers     # and the choice of every layer's form
    python examples/benchmarks/sweep.py --quick

For each family: median and worst ratio of a step that measures all samples, and of the default's
steps on average, to a plain step; all are interleaved. With --layers every Linear and convolution
is also timed by itself, in each form that its norms can take, with its own backward pass or fused
with it, one form after the other: the table has the form that the cost model chooses beside the
fastest one, and what the difference is in shares of the model's plain step. Writes sweep.json and
sweep.md into --out.

Legend: N samples, T positions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from models import Batch, Gpt, Workload, class_losses, images, token_losses
from overhead import measure
from report import lines
from torch import Tensor, nn

from adabatch.grad_sample.cost import layer_cost
from adabatch.grad_sample.layout import Layout
from adabatch.grad_sample.registry import find_grad_sampler
from adabatch.kernels.operators import forced_form

WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # channels of a convolution
KERNELS, STRIDES, SIDES = (1, 3, 5, 7), (1, 1, 2), (16, 24, 32, 48)
IMAGES = (8, 16, 32, 64, 128)  # samples of a CNN
LAYERS, EMBEDDINGS, HEADS = (1, 2, 3, 4), (64, 96, 128, 192, 256, 384), (1, 2, 4, 8)
LENGTHS, TEXTS, VOCABULARIES = (16, 32, 64, 128, 256), (4, 8, 16, 32), (64, 256, 1024, 4096)
UNITS, ROWS = (16, 32, 64, 128, 256, 512, 1024), (16, 32, 64, 128, 256, 512, 1024)
HOPELESS = 6.0  # times the plain backward pass: such ways are timed twice
MOST, LEAST = 5e9, 1e8  # multiply-adds of a step; what is drawn beyond is drawn again


def cnn(draw: random.Random, name: str) -> Workload:
    """Two to five convolutions with ReLU, with or without GroupNorm, a pool and a Linear."""
    samples, side, norm = draw.choice(IMAGES), draw.choice(SIDES), draw.random() < 0.5
    channels, layers, shapes = 3, [], []
    for _ in range(draw.randint(2, 5)):
        width, kernel = draw.choice(WIDTHS), draw.choice(KERNELS)
        stride = draw.choice(STRIDES)
        shapes.append(f"{width}x{kernel}/{stride}")
        layers.append((channels, width, kernel, stride))
        channels = width

    def make() -> nn.Module:
        parts: list[nn.Module] = []
        for width_in, width, kernel, stride in layers:
            parts += [nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=not norm)]
            parts += [nn.GroupNorm(8, width)] if norm else []
            parts += [nn.ReLU()]
        return nn.Sequential(
            *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))

    title = f"{side}², {' '.join(shapes)}{', GroupNorm' if norm else ''}, m={samples}"
    return Workload(name, title, make, images(samples, 3, side, side), class_losses)


def transformer(draw: random.Random, name: str) -> Workload:
    """A decoder as model d."""
    layers, width, heads = draw.choice(LAYERS), draw.choice(EMBEDDINGS), draw.choice(HEADS)
    positions, samples = draw.choice(LENGTHS), draw.choice(TEXTS)
    vocabulary = draw.choice(VOCABULARIES)

    def texts() -> Batch:
        shape = (samples, positions)
        return torch.randint(vocabulary, shape), torch.randint(vocabulary, shape)

    title = f"{layers} layers, d={width}, T={positions}, vocabulary {vocabulary}, m={samples}"
    return Workload(name, title, lambda: Gpt(layers, width, heads, positions, vocabulary), texts,
                    token_losses)


def mlp(draw: random.Random, name: str) -> Workload:
    """One to four hidden layers."""
    widths = [draw.choice(UNITS) for _ in range(draw.randint(2, 5))]
    samples = draw.choice(ROWS)

    def make() -> nn.Module:
        parts: list[nn.Module] = []
        for width_in, width in itertools.pairwise(widths):
            parts += [nn.Linear(width_in, width), nn.ReLU()]
        return nn.Sequential(*parts, nn.Linear(widths[-1], 10))

    title = f"{'-'.join(map(str, widths))}-10, m={samples}"
    return Workload(name, title, make, images(samples, widths[0]), class_losses)


FAMILIES: dict[str, tuple[Callable[[random.Random, str], Workload], int, float]] = {
    "CNN": (cnn, 15, LEAST), "transformer": (transformer, 15, LEAST), "MLP": (mlp, 10, 0)}


def drawn(family: str, count: int, seed: int) -> list[Workload]:
    """`count` workloads of a family whose steps are neither too long nor too short."""
    draw, (make, _, least), works = random.Random(f"{family} {seed}"), FAMILIES[family], []
    while len(works) < count:
        work = make(draw, f"{family} {len(works) + 1}")
        if least <= multiply_adds(work) <= MOST:
            works.append(work)
    return works


def multiply_adds(work: Workload) -> float:
    """Of the products of a plain step."""
    return sum(layer_cost(layer, inputs.shape, outputs.shape).training * len(inputs)
               for layer, inputs, outputs in calls(work, "meta"))


def calls(work: Workload, device: str) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """(layer, input, output) of every Linear and convolution with positions, in one forward
    pass."""
    with torch.device(device):
        model, (inputs, _) = work.setting()
    found: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((layer, args[0].detach(), output.detach()))

    handles = [layer.register_forward_hook(keep) for layer in model.modules()
               if isinstance(layer, nn.Linear | nn.Conv2d)]
    model(inputs)
    for handle in handles:
        handle.remove()
    return found


Way = tuple[bool, str]  # (fused, form)


def ways(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> list[Way]:
    """All ways to find a layer's norms, but for Gram matrices of more than four times the
    multiply-adds of the gradients."""
    if isinstance(layer, nn.Linear):
        forms = ["gradients"] if inputs.dim() > 2 else []
    else:
        forms = ["windows", "groups", "calls"] if layer.groups == 1 else []
    positions = inputs[0].numel() // layer.weight.shape[1]
    pairs = positions * sum(layer.weight.shape[:2])
    if forms and pairs < 4 * layer.weight.numel():
        forms.append("gram")
    return [(fused, form) for form in forms for fused in (False, True)]


def backward_pass(
    layer: nn.Module, inputs: Tensor, backprops: Tensor, way: Way | None, needs_inputs: bool
) -> Callable[[], None]:
    """A layer's backward pass, with its norms by `way`, or without any."""
    leaf = inputs.clone().requires_grad_(needs_inputs)
    outputs, sampler = layer(leaf), find_grad_sampler(layer)
    wanted = [*layer.parameters(), *([leaf] if needs_inputs else [])]

    def run() -> None:
        fused, form = way or (False, "")
        with forced_form(form) if form else nullcontext():
            if fused:
                sampler.fused.backward(
                    layer, (inputs,), layer.weight.detach(), backprops, len(inputs),
                    Layout.BATCH_FIRST, needs_inputs=needs_inputs)
                return
            torch.autograd.grad(outputs, wanted, backprops, retain_graph=True)
            if way:
                for factor in sampler.rule(layer, inputs, backprops).values():
                    factor.sq_norms()

    return run


def layer_rows(work: Workload, repeats: int, limit: float = 2.0) -> Iterator[dict[str, Any]]:
    """For each layer with positions: milliseconds of every way, the least of interleaved repeats
    (within `limit` seconds, but three at least), and which one the cost model chooses."""
    for index, (layer, inputs, outputs) in enumerate(calls(work, "cpu")):
        candidates = ways(layer, inputs, outputs)
        if not candidates:
            continue
        cost = layer_cost(layer, inputs.shape, outputs.shape)
        backprops = torch.randn_like(outputs)
        fused = cost.fused_is_cheaper(len(inputs), len(inputs))
        chosen = _named((fused, chosen_form(layer, inputs, outputs, fused)))
        runs = {way: backward_pass(layer, inputs, backprops, way, index > 0)
                for way in [None, *candidates]}
        best = dict.fromkeys(runs, float("inf"))
        # The processor time of one thread is hardly disturbed by other processes.
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        begin = clock()
        for repeat in range(repeats):
            if repeat > 2 and clock() - begin > limit:
                break
            for way, run in list(runs.items()):
                start = clock()
                run()
                best[way] = min(best[way], 1e3 * (clock() - start))
                if way and repeat and best[way] > HOPELESS * best[None]:
                    del runs[way]
        found = {_named(way): value for way, value in best.items() if way}
        shape = f"{tuple(inputs.shape)} -> {tuple(outputs.shape)}, {layer}"
        yield {"layer": shape, "plain": best[None], "ms": found, "chosen": chosen,
               "fastest": min(found, key=found.__getitem__)}


def chosen_form(layer: nn.Module, inputs: Tensor, outputs: Tensor, fused: bool) -> str:
    """The kernels' own choice."""
    from adabatch.kernels.cpu_conv import conv_form
    from adabatch.kernels.operators import outer_form

    if isinstance(layer, nn.Linear):
        positions = outputs.numel() // (len(outputs) * outputs.shape[-1])
        return outer_form(positions, inputs.shape[-1], outputs.shape[-1], with_gradient=fused)
    return conv_form(
        inputs.shape, outputs.shape, layer.weight.shape, layer.padding, layer.groups,
        with_gradient=fused)


def _named(way: Way) -> str:
    return f"{'fused' if way[0] else 'beside'}, {way[1]}"


def family_table(results: list[dict]) -> str:
    """Median and worst ratio of each family, and of each model."""
    rows = []
    for family in dict.fromkeys(result["family"] for result in results):
        own = [result for result in results if result["family"] == family]
        cells = []
        for method in ("Exact", "Budget"):
            ratios = sorted(next(row["median"] for row in result["rows"]
                                 if row["method"] == method) for result in own)
            middle = (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2
            cells += [f"{middle:.3f}", f"{ratios[-1]:.3f}"]
        rows.append([f"{len(own)} {family}s", *cells])
    head = ["", "all samples, median", "worst", "default, median", "worst"]
    models = [[result["title"], f"{result['rows'][0]['ms']:.1f}",
               *(f"{row['median']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
                 for row in result["rows"][1:])] for result in results]
    return "\n".join([lines(head, rows), lines(
        ["model", "plain step, ms", "all samples", "default"], models)])


def layer_table(results: list[dict]) -> str:
    """Layers whose choice is not the fastest by more than a hundredth of the step."""
    rows, total = [], []
    for result in results:
        step = result["rows"][0]["ms"]
        lost = [(row["ms"][row["chosen"]] - row["ms"][row["fastest"]]) / step
                for row in result["layers"]]
        total.append([result["title"], f"{100 * sum(lost):.1f} %"])
        rows += [[row["layer"], row["chosen"], row["fastest"],
                  f"{row['ms'][row['chosen']] / row['ms'][row['fastest']]:.2f}", f"{share:.3f}"]
                 for row, share in zip(result["layers"], lost, strict=True) if share > 0.01]
    head = ["layer", "chosen", "fastest", "its time / the fastest's", "lost share of the step"]
    return "\n".join([lines(head, rows), lines(["model", "lost by all choices"], total)])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated")
    parser.add_argument("--models", type=int, help="of each family (default 15, 15 and 10)")
    parser.add_argument("--repeats", type=int, default=21, help="of each step (default 21)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default 2)")
    parser.add_argument("--layers", action="store_true", help="time every layer's forms too")
    parser.add_argument("--quick", action="store_true", help="one model a family, three repeats")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"))
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.repeats, options.layers = 1, 3, True
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[dict] = []
    for family in options.families.split(","):
        for work in drawn(family, options.models or FAMILIES[family][1], options.seed):
            result = measure(work, ["Plain", "Exact", "Budget"], options.repeats, "cpu", False)
            result["family"] = family
            result["layers"] = list(layer_rows(work, options.repeats)) if options.layers else []
            results.append(result)
            print(work.title, *(f"{row['median']:.3f}" for row in result["rows"][1:]), flush=True)
            text = family_table(results) + ("\n" + layer_table(results) if options.layers else "")
            setting = {"torch": torch.__version__, "threads": options.threads,
                       "seed": options.seed, "repeats": options.repeats}
            (options.out / "sweep.json").write_text(
                json.dumps({"setting": setting, "results": results}, indent=1))
            (options.out / "sweep.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
