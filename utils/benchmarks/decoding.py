"""Does a file decode under other floating point? How much σ and μ differ under every setting of this machine.

    python -m utils.benchmarks.decoding -d kodak
    python -m utils.benchmarks.decoding -d kodak --crop 256 -l 3 --compile      # compiling takes minutes on a CPU

Pictures are encoded with the defaults of the CPU; under every other setting μ and σ are computed from the same symbols,
and the file is decoded. σ may differ by less than ε, relatively (models/coding/portable.py), except below the table.
"""

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from models import Codec
from models.coding.portable import scale_factors, table_rows, unpack_scales
from models.coding.precision import deterministic
from models.coding.side_info import DecodingError
from models.coding.slice_coders import QuantizedLatents
from utils import cli
from utils.checkpoint import load_model
from utils.cli.encoding_arguments import rate_index
from utils.codec.analyzed import AnalyzedImage
from utils.codec.bitstream import unpack
from utils.codec.decode import decode
from utils.files import BUNDLED, json_output
from utils.images import center_crop, read_image
from utils.messages import print_weights
from utils.pictures import find_images_or_samples
from utils.training.compiled import compile_networks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders or pictures (default: scikit-image's photographs)")
    add("-l", "--index", nargs="+", type=rate_index, default=[0, 2.5, 5], metavar="L", help="rate indexes")
    add("--crop", type=cli.positive, metavar="N", help="the middle N×N pixels of the pictures (default: all of them)")
    add("--compile", action="store_true", help="torch.compile too: minutes, for every size of picture")
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="weights")
    add("--json", metavar="FILE", help="write the figures; - is standard output")
    return parser.parse_args(argv)


def settings(model: Codec, with_compile: bool) -> Iterator[tuple[str, Codec]]:
    """What a decoder may run under besides the defaults: a name and the model to use, in force until the next one."""
    threads = torch.get_num_threads()
    for count in (1 if threads > 1 else 2, 3):
        torch.set_num_threads(count)
        yield f"{count} thread{'s' * (count > 1)}", model
    torch.set_num_threads(threads)
    yield "other memory format", copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    with sdpa_kernel(SDPBackend.MATH):
        yield "attention not fused", model
    with torch.backends.mkldnn.flags(enabled=False):
        yield "without oneDNN", model
    yield "float64", copy.deepcopy(model).double()
    to_compile = {"compiled": copy.deepcopy(model)}
    if torch.cuda.is_available():
        to_compile["CUDA, compiled"] = on_gpu = copy.deepcopy(model).cuda()
        yield "CUDA", on_gpu
    if with_compile:
        for name, other in to_compile.items():
            compile_networks(other)
            yield name, other


@torch.no_grad()
def predict(model: Codec, quantized: QuantizedLatents) -> Tensor:
    """μ and σ of known symbols: `[2, 1, M, h, w]`, on the CPU."""
    parts = iter(model.order.split(quantized.y))
    seen = []

    def replay(mu: Tensor, sigma: Tensor) -> Tensor:
        seen.append((mu.cpu(), sigma.cpu()))
        return next(parts).to(mu) + mu

    with deterministic():
        model.run_slices(quantized.z.to(model.medians) + model.medians, replay)
    return torch.stack([model.order.join(values) for values in zip(*seen, strict=True)])


def compare(other: Codec, model: Codec, data: bytes, quantized: QuantizedLatents, mu: Tensor, sigma: Tensor) -> tuple:
    """Errors of σ `[n]`, relative, the largest of μ, how many table rows differ, and whether the file is decoded."""
    gaussian = model.gaussian_conditional
    count = mu.numel()
    other_mu, other_sigma = predict(other, quantized)
    ours, theirs = (gaussian.lower_bound_scale(values).double() for values in (sigma, other_sigma))
    shifts, _, _ = unpack_scales(quantized.side_info[0].scales, count)
    shifted = model.order.flatten(other_sigma) * scale_factors(gaussian, shifts, first=0, end=count)
    differing = int((table_rows(gaussian, shifted) != model.order.flatten(quantized.rows)).sum())
    try:
        decode(other, replace(unpack(data), fingerprint=other.fingerprint))  # float64 weights have another one
        decoded = True
    except DecodingError:
        decoded = False
    errors = (theirs / ours - 1).abs().float().flatten()
    return errors, float((other_mu.double() - mu).abs().max()), differing, decoded


def run(args: argparse.Namespace, write_json: Callable[[dict], None]) -> None:
    """Compare the settings, and print the table."""
    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # when a flag is set back
    images = [read_image(path) for path in find_images_or_samples(args.data)]
    model = load_model(args.checkpoint)
    print_weights(args.checkpoint)
    files = []
    results = {}
    for image in tqdm(images, desc="encoding", unit="image", leave=False, disable=None):
        analyzed = AnalyzedImage(model, center_crop(image, args.crop) if args.crop else image)
        for trial in map(analyzed.quantize, args.index):
            files.append((analyzed.write(trial).data, trial.quantized, *predict(model, trial.quantized)))
    print(f"{'setting':<22} σ, largest  σ, 99.9 % μ, largest    rows  file decoded")
    for name, other in settings(model, args.compile):
        bar = tqdm(files, desc=name, unit="file", leave=False, disable=None)
        sigma, mu, differing, decoded = zip(*(compare(other, model, *file) for file in bar), strict=True)
        results[name] = found = {
            "sigma_largest": float(torch.cat(sigma).max()),
            "sigma_999": float(np.quantile(torch.cat(sigma).numpy(), 0.999)),
            "mu_largest": max(mu),
            "rows": sum(differing),
            "most_rows_of_a_file": max(differing),
            "files": len(files),
            "decoded": sum(decoded),
        }
        figures = " ".join(f"{found[key]:10.1e}" for key in ("sigma_largest", "sigma_999", "mu_largest"))
        print(f"{name:<22} {figures} {sum(differing):7d} {max(differing):5d} {sum(decoded)}/{len(files)}")
    where = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"ε = {model.epsilon:g}; {len(images)} pictures, indexes {args.index}; {where}")
    write_json(results)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with json_output(args.json) as write_json:
        run(args, write_json)


if __name__ == "__main__":
    cli.run(main)
