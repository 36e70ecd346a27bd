"""How well files meet their target: targets spread over each picture's reachable range, one probe, three, and a cap.

    python -m utils.benchmark_control -d kodak --json control.json
"""

import argparse
import statistics
import time

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.tcm import TCM_VBR
from utils import cli
from utils.checkpoint import BUNDLED, load_model
from utils.evaluation import encode
from utils.files import write_json
from utils.images import read_image
from utils.ladder import MAX_INDEX
from utils.online import need_variable_rate
from utils.orders import Target
from utils.rate_control import Picture
from utils.report import short_names

MODES = {"one probe": (1, False), "at most three": (3, False), "not above": (3, True)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=cli.Formatter
    )
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders or pictures (default: scikit-image's photographs)")
    add("--targets", type=int, default=5, metavar="N", help="targets a picture and mode")
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="variable-rate weights")
    add("--json", metavar="FILE", help="write every target, size and time")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser.parse_args(argv)


def measure(model: TCM_VBR, name: str, image: Tensor, targets: int) -> list[dict]:
    """One picture, uint8 `[3, H, W]`: a row for each mode and target."""
    picture = Picture(model, image)
    smallest, largest = (8 * len(picture.code(picture.quantise(index))) for index in (0.0, MAX_INDEX))
    start = time.perf_counter()
    encode(model, image, MAX_INDEX / 2)
    encode_seconds = time.perf_counter() - start
    rows = []
    for mode, (most_probes, cap) in MODES.items():
        for share in (np.arange(targets) + 0.5) / targets:
            target = Target(float(round(smallest + share * (largest - smallest))), cap)
            start = time.perf_counter()
            steered = Picture(model, image)
            analysed = time.perf_counter()
            probe, data = steered.steer(target, most_probes)
            end = time.perf_counter()
            rows.append(
                {
                    "image": name,
                    "mode": mode,
                    "target_bits": target.bits,
                    "bits": 8 * len(data),
                    "error": 8 * len(data) / target.bits - 1,
                    "index": probe.index,
                    "probes": steered.measured - 1,
                    "seconds": end - start,
                    "probe_seconds": (end - analysed) / (steered.measured),
                    "encode_seconds": encode_seconds,
                }
            )
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = cli.pick_device(args.device)
    model = load_model(args.checkpoint, device)
    need_variable_rate(model, args.checkpoint)
    model.prepare()
    paths = cli.pictures(args.data)
    names, rows = short_names(paths), []
    for path in tqdm(paths, unit="image", disable=None):
        rows += measure(model, names[path], read_image(path).to(device), args.targets)
    head = f"{'mode':<15} {'mean |error| %':>14} {'worst %':>8} {'highest %':>9} {'probes':>6} {'seconds':>7} "
    print(head + "probe/encode")
    for mode in MODES:
        chosen = [row for row in rows if row["mode"] == mode]
        errors = [100 * row["error"] for row in chosen]
        mean, worst = statistics.mean(map(abs, errors)), max(errors, key=abs)
        probes, seconds = (statistics.mean(row[key] for row in chosen) for key in ("probes", "seconds"))
        share = statistics.median(row["probe_seconds"] / row["encode_seconds"] for row in chosen)
        print(f"{mode:<15} {mean:14.3f} {worst:8.2f} {max(errors):9.3f} {probes:6.2f} {seconds:7.2f} {share:12.2f}")
    print(f"{len(paths)} pictures, {args.targets} targets each; on {torch.get_num_threads()} threads of {device}")
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    cli.run(main)
