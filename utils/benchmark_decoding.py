"""Does a file decode under other floating point? What σ and μ differ by under every setting of this machine.

    python -m utils.benchmark_decoding -d kodak
    python -m utils.benchmark_decoding -d kodak --crop 256 -l 3 --compile      # compiling takes minutes on a CPU

Pictures are encoded with the defaults of the CPU. Under every other setting the slice walk is then given the same
symbols, and the file is decoded for real. σ may differ by less than ε (models/sensitive.py), relatively, those below
the scale table apart; where a row of the table differs, the file's list has to name it.
"""

import argparse
import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from models.guard import DecodingError
from models.sensitive import factors, read_listed, table_index
from models.tcm import TCM, repeatable
from utils import cli
from utils.checkpoint import BUNDLED, load_model
from utils.files import write_json
from utils.images import pad, read_image, to_float
from utils.run_arguments import centre_crop
from utils.training import compile_networks

Setting = Callable[[TCM], contextlib.AbstractContextManager[TCM]]


@contextlib.contextmanager
def _threads(model: TCM, count: int) -> Iterator[TCM]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield model
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _under(model: TCM, context: contextlib.AbstractContextManager) -> Iterator[TCM]:
    with context:
        yield model


@contextlib.contextmanager
def _changed(model: TCM, change: Callable[[TCM], object]) -> Iterator[TCM]:
    changed = copy.deepcopy(model)
    change(changed)
    yield changed


def settings(compiled: bool) -> dict[str, Setting]:
    """What a decoder may run under, by name, besides the encoder's own defaults; CUDA where there is one."""
    few = 1 if torch.get_num_threads() > 1 else 2
    found: dict[str, Setting] = {
        f"{few} thread{'s' * (few > 1)}": lambda model: _threads(model, few),
        "3 threads": lambda model: _threads(model, 3),
        "other memory format": lambda model: _changed(model, lambda m: m.to(memory_format=torch.contiguous_format)),
        "attention not fused": lambda model: _under(model, sdpa_kernel(SDPBackend.MATH)),
        "without oneDNN": lambda model: _under(model, torch.backends.mkldnn.flags(enabled=False)),
        "float64": lambda model: _changed(model, TCM.double),
    }
    if compiled:
        found["compiled"] = lambda model: _changed(model, compile_networks)
    if torch.cuda.is_available():
        found["CUDA"] = lambda model: _changed(model, TCM.cuda)
        if compiled:
            found["CUDA, compiled"] = lambda model: _changed(model, lambda m: compile_networks(m.cuda()))
    return found


class Replay:
    """A slice coder that knows the symbols `[B, M, h, w]`, and keeps the μ and σ that it is shown."""

    def __init__(self, symbols: Tensor, num_slices: int) -> None:
        self.slices = symbols.chunk(num_slices, 1)
        self.mu: list[Tensor] = []
        self.sigma: list[Tensor] = []

    def __call__(self, mu: Tensor, sigma: Tensor) -> Tensor:
        symbols = self.slices[len(self.mu)]
        self.mu.append(mu.cpu())
        self.sigma.append(sigma.cpu())
        return symbols.to(mu) + mu


@dataclass
class File:
    """A picture as it was encoded: what `compress` returned, its symbols, and the walk's μ and σ, with its factors."""

    index: float
    coded: dict
    z: Tensor
    symbols: Tensor
    mu: Tensor
    sigma: Tensor
    factors: Tensor


@dataclass
class Differences:
    """Of all files under one setting."""

    sigma: list[np.ndarray] = field(default_factory=list)  # relative
    mu: float = 0.0  # largest, in quantisation steps
    rows: int = 0  # positions whose row of the scale table differs
    most_rows: int = 0  # of one file
    files: int = 0
    decoded: int = 0

    def add(self, model: TCM, file: File, mu: Tensor, sigma: Tensor, decoded: bool) -> None:
        gaussian = model.gaussian_conditional
        theirs, ours = (part.double().clamp(min=float(gaussian.scale_table[0])) for part in (sigma, file.sigma))
        self.sigma.append((theirs / ours - 1).abs().float().flatten().numpy())
        self.mu = max(self.mu, float((mu.double() - file.mu).abs().max()))
        rows = table_index(gaussian, sigma * file.factors) != table_index(gaussian, file.sigma * file.factors)
        self.rows += int(rows.sum())
        self.most_rows = max(self.most_rows, int(rows.sum()))
        self.files += 1
        self.decoded += decoded

    def summary(self) -> dict[str, float]:
        sigma = np.concatenate(self.sigma)
        return {
            "sigma_largest": float(sigma.max()),
            "sigma_999": float(np.quantile(sigma, 0.999)),
            "mu_largest": self.mu,
            "rows": self.rows,
            "most_rows_of_a_file": self.most_rows,
            "files": self.files,
            "decoded": self.decoded,
        }


@torch.no_grad()
def encode(model: TCM, image: Tensor, index: float) -> File:
    """A picture, uint8 `[3, H, W]`, under the defaults."""
    rates = model.resolve_index(index, 1)
    y, _ = model.analyze(pad(to_float(image)), rates)
    quantised = model.quantise(y, model.h_a(y))
    mu, sigma = walk(model, quantised.z, quantised.symbols)
    count = sigma.numel()
    shifts, _, _ = read_listed(quantised.guards[0].listed, True, count)
    moved = factors(model.gaussian_conditional, shifts, count).view(sigma.shape)
    return File(index, model.code(quantised), quantised.z, quantised.symbols, mu, sigma, moved)


@torch.no_grad()
def walk(model: TCM, z: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor]:
    """μ and σ `[1, M, h, w]` of the slice walk over known symbols, on the CPU."""
    replay = Replay(symbols, model.num_slices)
    with repeatable():
        model.walk(z.to(model.medians) + model.medians, replay)
    return torch.cat(replay.mu, 1), torch.cat(replay.sigma, 1)


def decodes(model: TCM, file: File) -> bool:
    """Whether every symbol comes back, in this process and under what is set now."""
    try:
        model.decompress(file.coded["strings"], file.coded["shape"], file.index, file.coded["guards"])
    except DecodingError:
        return False
    return True


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=cli.Formatter)
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders or pictures (default: scikit-image's photographs)")
    add("-l", "--index", nargs="+", type=float, default=[0, 2.5, 5], metavar="L", help="rate indices")
    add("--crop", type=int, metavar="N", help="the middle N×N pixels of the pictures (default: all of them)")
    add("--compile", action="store_true", help="torch.compile too: minutes, for every size of picture")
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="weights")
    add("--json", metavar="FILE", help="write the figures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # of setting a flag back
    model = load_model(args.checkpoint)
    images = [read_image(path) for path in cli.pictures(args.data)]
    if args.crop:
        images = [centre_crop(image, args.crop) for image in images]
    found = settings(args.compile)
    work = [(image, index) for image in images for index in args.index]
    with tqdm(total=len(work) * (1 + len(found)), unit="file", disable=None) as bar:
        files = []
        for image, index in work:
            files.append(encode(model, image, index))
            bar.update()
        results = {}
        for name, setting in found.items():
            bar.set_postfix_str(name)
            total = Differences()
            with setting(model) as other:
                for file in files:
                    total.add(model, file, *walk(other, file.z, file.symbols), decodes(other, file))
                    bar.update()
            results[name] = total.summary()
    print(f"{'setting':<22} {'σ, largest':>10} {'σ, 99.9 %':>10} {'μ, largest':>10} {'rows':>6} {'a file':>6} decoded")
    for name, row in results.items():
        numbers = " ".join(f"{row[key]:10.1e}" for key in ("sigma_largest", "sigma_999", "mu_largest"))
        print(f"{name:<22} {numbers} {row['rows']:6d} {row['most_rows_of_a_file']:6d} {row['decoded']}/{row['files']}")
    print(
        f"ε = {model.epsilon:g}; {len(images)} pictures, indices {args.index}; torch {torch.__version__},"
        f" {torch.get_num_threads()} threads"
    )
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    cli.run(main)
