"""Where the time of coding goes on this machine: analysis, slices, entropy coding, synthesis.

    python -m utils.benchmarks.speed                              # TCM small, 768×512
    python -m utils.benchmarks.speed --preset full --width 1920 --height 1080

Weights are random unless --checkpoint is given: the arithmetic does not depend on them. The σ of random weights mean
nothing, so the coder's symbols are then drawn with σ log-uniform in 0.11 … 1 (0.8 bits per symbol). GMAC are counted
by PyTorch's FLOP counter; the rate to compare with is that of a matrix product in the same precision in this process:
float32, and on a GPU TF32 for analysis and synthesis, whose convolutions PyTorch computes so by default.
"""

import argparse

import torch

from models.coding.portable import PortableRows
from models.coding.tables import open_stream
from models.registry import PRESETS, from_preset
from utils import cli
from utils.benchmarks.common import convolutions_use_tf32, count_macs, matrix_product, median_seconds, peak_of
from utils.benchmarks.decoding import predict
from utils.checkpoint import load_model
from utils.device import pick_device
from utils.images import pad
from utils.messages import print_weights


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="small", help="architecture")
    add("--checkpoint", metavar="FILE", help="weights, in place of random ones of the preset")
    add("--width", type=cli.positive, default=768, metavar="W", help="width of the picture in pixels")
    add("--height", type=cli.positive, default=512, metavar="H", help="height of the picture in pixels")
    add("--runs", type=cli.positive, default=5, metavar="R", help="timed runs; the median is printed")
    add("--threads", type=cli.positive, metavar="T", help="CPU threads (default: as many as PyTorch chooses)")
    cli.add_device_argument(parser)
    return parser.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = pick_device(args.device)
    if args.checkpoint:
        model = load_model(args.checkpoint, device)
        print_weights(args.checkpoint)
    else:
        model = from_preset(args.preset).eval()
        model.update()
        model.to(device, memory_format=torch.channels_last)
    x = pad(torch.rand(1, 3, args.height, args.width, device=device))
    index = model.resolve_index(2.5, 1)
    y, _ = model.analyze(x, index)
    quantized = model.quantize(y, model.h_a(y), portable=False, complete=True)
    works = {
        "analysis": lambda: model.analyze(x, index),
        "hyper + slices": lambda: model.quantize(y, model.h_a(y), portable=False),
        "synthesis": lambda: model.synthesize(quantized.y_hat, index),
    }
    peak = peak_of(works.values(), device)
    tf32 = convolutions_use_tf32(device)
    references = {"float32 matrix product": matrix_product(device)}
    if tf32:
        references["TF32 matrix product"] = matrix_product(device, tf32=True)
    works = references | works
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{args.width}×{args.height}, padded to {x.shape[3]}×{x.shape[2]}, {type(model).__name__}, M={model.M}")
    print(f"{'':<22} {'seconds':>9} {'GMAC':>8} {'GMAC/s':>8} {'of matrix rate':>15}")
    seconds = median_seconds(works.values(), device, args.runs)
    measured = {name: (s, count_macs(work)) for (name, work), s in zip(works.items(), seconds, strict=True)}
    measured["analysis + synthesis"] = tuple(map(sum, zip(measured["analysis"], measured["synthesis"], strict=True)))
    full = "float32 matrix product", "hyper + slices"  # deterministic() everywhere
    for name, (spent, macs) in measured.items():
        product_seconds, product_macs = measured["TF32 matrix product" if tf32 and name not in full else full[0]]
        share = macs / spent / (product_macs / product_seconds)
        print(f"{name:<22} {spent:9.3f} {macs / 1e9:8.1f} {macs / spent / 1e9:8.1f} {share:15.0%}")

    tables = model.coding_tables[0]
    symbols = model.order.flatten(quantized.y)[0].int()
    if args.checkpoint:
        sigma = model.order.flatten(predict(model, quantized)[1])[0].to(device)
    else:
        drawn = torch.empty(symbols.shape).uniform_(-2.2, 0.0).exp()
        symbols = (torch.randn(symbols.shape) * drawn).round().int()
        sigma = drawn.to(device)
    coded = dict(symbols=symbols.to(device), sigma=sigma, epsilon=model.epsilon)

    def choose_rows() -> torch.Tensor:
        portable = PortableRows()
        chosen = portable.add(model.gaussian_conditional, tables.code_lengths, **coded)
        portable.pack()
        return chosen

    rows = choose_rows().cpu()
    parts = rows.split([part.numel() for part in model.order.split(quantized.y)])
    stream = tables.to_stream(symbols, rows)

    def read_stream() -> None:
        decoder = open_stream(stream, rows.numel())
        for part in parts:
            tables.from_stream(decoder, part)

    works = {"rows": choose_rows, "to bytes": lambda: tables.to_stream(symbols, rows), "from bytes": read_stream}
    for name, work in works.items():
        (spent,) = median_seconds([work], device, args.runs)
        print(f"{'coding y: ' + name:<22} {spent:9.3f}")
    print(f"peak memory of the networks {peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    cli.run(main)
