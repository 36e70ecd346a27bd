"""Where the time goes: analysis, slice walk, entropy coding, synthesis, on this machine.

    python -m utils.benchmark                              # bundled architecture, 768×512
    python -m utils.benchmark --preset full --width 1920 --height 1080

Weights are random unless --checkpoint is given: the arithmetic does not depend on them. Random weights
say nothing of σ, so the coder's symbols are then drawn from σ log-uniform in 0.11 … 1 (0.8 bits a symbol).
GMAC are counted by PyTorch's FLOP counter; the rate to compare with is that of a float32 matrix product
in this process.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.coding import CodingTables, Encode, open_stream, ste_round
from models.sensitive import guard_rows
from models.tcm import PRESETS, TCM_VBR
from utils import cli
from utils.checkpoint import load_model
from utils.images import pad


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=cli.Formatter
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="small", help="architecture")
    add("--checkpoint", metavar="FILE", help="weights, in place of random ones of the preset")
    add("--width", type=int, default=768, metavar="W", help="of the image, in pixels")
    add("--height", type=int, default=512, metavar="H", help="of the image, in pixels")
    add("--runs", type=int, default=5, metavar="R", help="timed runs; the median is printed")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="T", help="CPU threads")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser.parse_args(argv)


class Timer:
    """Median seconds of one or more pieces of work, run in turn, after two warm-ups.

    In turn, because a shared machine's speed drifts: what is to be compared has to be measured together.
    """

    def __init__(self, device: torch.device, runs: int) -> None:
        self.device, self.runs = device, runs

    def __call__(self, *works: Callable[[], object]) -> list[float]:
        rounds = [[self._once(work) for work in works] for _ in range(self.runs + 2)]
        return [statistics.median(seconds) for seconds in zip(*rounds[2:], strict=True)]

    def _once(self, work: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class MatrixProduct:
    """A product of two square matrices: the rate that networks are compared with."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        size = 8192 if device.type == "cuda" else 2048
        self.a, self.b = torch.randn(2, size, size, device=device, dtype=dtype)
        self.macs = size**3

    def __call__(self) -> Tensor:
        return self.a @ self.b


def macs(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


def drawn_symbols(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Symbols and σ like a trained model's: log-uniform in 0.11 … 1."""
    sigma = torch.empty(shape).uniform_(-2.2, 0.0).exp()
    return (torch.randn(shape) * sigma).round().int(), sigma


def decode_slices(tables: CodingTables, stream: bytes, rows: Tensor, slices: int) -> None:
    decoder = open_stream(stream, rows.numel())
    for part in rows.chunk(slices):
        tables.decode(decoder, part)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.runs < 1:
        raise cli.UserError("--runs must be at least 1")
    device = cli.pick_device(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.checkpoint:
        model = load_model(args.checkpoint, device)
    else:
        model = TCM_VBR(**PRESETS[args.preset]).eval()
        model.update()
        model.to(device, memory_format=torch.channels_last)
    x = pad(torch.rand(1, 3, args.height, args.width, device=device))
    index = model.resolve_index(2.5, 1)
    timer = Timer(device, args.runs)

    y, _ = model.analyze(x, index)
    z_hat = ste_round(model.h_a(y) - model.medians) + model.medians
    coder = Encode(y, model.num_slices)
    y_hat = model.walk(z_hat, coder)
    symbols, sigma = coder.symbols[0], coder.sigma[0]

    def walk() -> None:
        z_hat = ste_round(model.h_a(y) - model.medians) + model.medians
        model.walk(z_hat, Encode(y, model.num_slices))

    networks = {
        "analysis": lambda: model.analyze(x, index),
        "hyper + slice walk": walk,
        "synthesis": lambda: model.synthesize(y_hat, index),
    }
    product = MatrixProduct(device)
    print(f"{device}, {args.threads} threads, torch {torch.__version__}")
    print(f"{args.width}×{args.height}, padded to {x.shape[3]}×{x.shape[2]}, N={model.N}, M={model.M}")
    print(f"{'':<22} {'seconds':>9} {'GMAC':>8} {'GMAC/s':>8} {'of matrix rate':>15}")
    product_seconds, *seconds = timer(product, *networks.values())
    rate = product.macs / product_seconds
    measured = {name: (s, macs(work)) for (name, work), s in zip(networks.items(), seconds, strict=True)}
    measured["analysis + synthesis"] = tuple(map(sum, zip(measured["analysis"], measured["synthesis"], strict=True)))
    measured["float32 matrix product"] = product_seconds, product.macs
    for name, (spent, count) in measured.items():
        print(f"{name:<22} {spent:9.3f} {count / 1e9:8.1f} {count / spent / 1e9:8.1f} {count / spent / rate:15.0%}")

    tables = model.tables[0]
    if not args.checkpoint:
        symbols, sigma = drawn_symbols(symbols.shape)
        sigma = sigma.to(device)
    parts = tables.code_lengths, symbols.flatten(), sigma.flatten()
    rows = guard_rows(model.gaussian_conditional, *parts, model.epsilon)[0].view(symbols.shape)
    stream = tables.encode(symbols, rows)
    slices = model.num_slices
    (choosing,) = timer(lambda: guard_rows(model.gaussian_conditional, *parts, model.epsilon))
    (to_bytes,) = timer(lambda: tables.encode(symbols, rows))
    (from_bytes,) = timer(lambda: decode_slices(tables, stream, rows, slices))
    print(f"{'coding y: table rows':<22} {choosing:9.3f}")
    print(f"{'coding y: to bytes':<22} {to_bytes:9.3f}")
    print(f"{'coding y: from bytes':<22} {from_bytes:9.3f}")
    print(f"peak memory {peak_memory(device) / 2**20:.0f} MiB")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the process on the CPU, of PyTorch's tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    cli.run(main)
