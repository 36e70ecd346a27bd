"""Does a file decode under other floating point? How much σ and μ differ under every setting of this machine.

    python -m utils.benchmarks.decoding -d kodak
    python -m utils.benchmarks.decoding -d kodak --crop 256 -l 3 --compile      # compiling takes minutes on a CPU

Pictures are encoded with the defaults of the CPU; under every other setting μ and σ are computed from the same symbols,
and the file is decoded. σ may differ by less than ε (models/portable.py), relatively, except below the scale table.
"""

import argparse
import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from utils import cli
from utils.files import BUNDLED, write_json
from utils.pictures import find_images_or_samples

if TYPE_CHECKING:  # PyTorch takes seconds to import: --help does without, so the functions below import what needs it
    from torch import Tensor

    from models import TCM
    from models.slice_coders import QuantizedLatents


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders or pictures (default: scikit-image's photographs)")
    add("-l", "--index", nargs="+", type=float, default=[0, 2.5, 5], metavar="L", help="rate indexes")
    add("--crop", type=int, metavar="N", help="the middle N×N pixels of the pictures (default: all of them)")
    add("--compile", action="store_true", help="torch.compile too: minutes, for every size of picture")
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="weights")
    add("--json", metavar="FILE", help="write the figures")
    return parser.parse_args(argv)


def settings(model: "TCM", with_compile: bool) -> Iterator[tuple[str, "TCM"]]:
    """What a decoder may run under besides the defaults: a name and the model to use, in force until the next one."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

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
    on_gpu = [copy.deepcopy(model).cuda()] if torch.cuda.is_available() else []
    for other in on_gpu:
        yield "CUDA", other
    if with_compile:
        from utils.training.trainer import compile_networks

        for name, other in zip(("compiled", "CUDA, compiled"), [copy.deepcopy(model), *on_gpu], strict=False):
            compile_networks(other)
            yield name, other


def predict(model: "TCM", quantized: "QuantizedLatents") -> "Tensor":
    """μ and σ of known symbols: `[2, 1, M, h, w]`, on the CPU."""
    import torch

    from models.tcm import deterministic

    slices, seen = iter(quantized.y.chunk(model.num_slices, 1)), []

    def replay(mu: "Tensor", sigma: "Tensor") -> "Tensor":
        seen.append(torch.stack([mu, sigma]).cpu())
        return next(slices).to(mu) + mu

    with torch.no_grad(), deterministic():
        model.run_slices(quantized.z.to(model.medians) + model.medians, replay)
    return torch.cat(seen, 2)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    import torch

    from models.portable import scale_factors, table_index, unpack_scales
    from models.side_info import DecodingError
    from utils.checkpoint import load_model
    from utils.codec.analyzed import AnalyzedImage
    from utils.codec.decode import decode
    from utils.images import center_crop, read_image

    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # of setting a flag back
    images = [read_image(path) for path in find_images_or_samples(args.data)]
    model = load_model(args.checkpoint)
    cli.print_weights(args.checkpoint)
    gaussian, files, results = model.gaussian_conditional, [], {}
    for image in tqdm(images, desc="encoding", unit="image", leave=False, disable=None):
        analyzed = AnalyzedImage(model, center_crop(image, args.crop) if args.crop else image)
        for trial in map(analyzed.quantize, args.index):
            files.append((analyzed.write(trial), trial.quantized, predict(model, trial.quantized)[0]))
    print(f"{'setting':<22} {'σ, largest':>10} {'σ, 99.9 %':>10} {'μ, largest':>10} {'indexes':>7} {'file':>5} decoded")
    for name, other in settings(model, args.compile):
        sigma_errors, mu_errors, differing, decoded = [], [], [], 0
        for data, quantized, mu in tqdm(files, desc=name, unit="file", leave=False, disable=None):
            other_mu, other_sigma = predict(other, quantized)
            ours, theirs = (gaussian.lower_bound_scale(sigma).double() for sigma in (quantized.sigma, other_sigma))
            sigma_errors.append((theirs / ours - 1).abs().float().flatten())
            mu_errors.append(float((other_mu.double() - mu).abs().max()))
            shifts, _, _ = unpack_scales(quantized.side_info[0].scales, mu.numel())
            shifted = other_sigma * scale_factors(gaussian, shifts, mu.numel()).view(mu.shape)
            differing.append(int((table_index(gaussian, shifted) != quantized.indexes).sum()))
            with contextlib.suppress(DecodingError):
                decode(other, data)  # changed copies keep the fingerprint, which writing the file cached
                decoded += 1
        sigma_errors = torch.cat(sigma_errors).numpy()
        results[name] = {
            "sigma_largest": float(sigma_errors.max()),
            "sigma_999": float(np.quantile(sigma_errors, 0.999)),
            "mu_largest": max(mu_errors),
            "rows": sum(differing),
            "most_rows_of_a_file": max(differing),
            "files": len(files),
            "decoded": decoded,
        }
        figures = " ".join(f"{results[name][key]:10.1e}" for key in ("sigma_largest", "sigma_999", "mu_largest"))
        print(f"{name:<22} {figures} {sum(differing):7d} {max(differing):5d} {decoded}/{len(files)}")
    where = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"ε = {model.epsilon:g}; {len(images)} pictures, indexes {args.index}; {where}")
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    cli.run(main)
