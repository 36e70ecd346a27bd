"""How well files meet their target: targets spread over what each picture can reach, one trial, three, and a cap.

    python -m utils.benchmarks.rate_control -d kodak --json control.json
"""

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from models import VariableRate
from models.lambdas import LAST_INDEX, MAX_INDEX, MIN_INDEX
from utils import cli
from utils.checkpoint import load_model
from utils.cli.encoding_arguments import add_map_arguments, check_map_arguments, map_of_arguments, rate_index
from utils.codec.analyzed import AnalyzedImage
from utils.codec.encode import encode
from utils.codec.quality_map import QualityMap
from utils.codec.rate_control import RateController
from utils.codec.request import EncodeRequest, Target
from utils.device import clock, pick_device, timed
from utils.evaluation.evaluate import for_each
from utils.files import BUNDLED, json_output
from utils.messages import print_weights
from utils.pictures import find_images_or_samples

MODES = {"one trial": (1, False), "three trials": (3, False), "not above": (3, True)}  # trials; whether it is a cap


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("-d", "--data", nargs="+", metavar="DIR", help="folders or pictures (default: scikit-image's photographs)")
    add("--targets", type=cli.positive, default=5, metavar="N", help="targets per picture and mode")
    ends = dict(nargs=2, type=rate_index, default=[MIN_INDEX, MAX_INDEX], metavar=("LOW", "HIGH"))
    add("--indexes", **ends, help="targets lie between the rates of these")
    add("--checkpoint", default=str(BUNDLED), metavar="FILE", help="variable-rate weights")
    add("--json", metavar="FILE", help="write every target, size and time; - is standard output")
    add_map_arguments(parser)
    cli.add_device_argument(parser)
    args = parser.parse_args(argv)
    check_map_arguments(parser, args)
    if args.indexes[0] >= args.indexes[1]:
        parser.error("--indexes: the first must be the lower one")
    return args


def measure(
    model: VariableRate, name: str, image: Tensor, targets: int, indexes: Sequence[float],
    quality_map: QualityMap | None = None,
) -> list[dict]:
    """Encode one picture, uint8 `[3, H, W]`, to every target in every mode; a row for each.

    indexes: two, between whose rates the targets lie.
    """
    analyzed = AnalyzedImage(model, image, quality_map)
    smallest, largest = (analyzed.write(analyzed.quantize(index)).bits for index in indexes)
    _, encode_seconds = timed(lambda: encode(model, image, EncodeRequest(LAST_INDEX / 2)), image.device)
    rows = []
    for mode, (max_trials, cap) in MODES.items():
        for number in range(targets):
            share = (number + 0.5) / targets
            target = Target(float(round(smallest + share * (largest - smallest))), cap)
            start = clock(image.device)
            controller = RateController(AnalyzedImage(model, image, quality_map))
            analysis_end = clock(image.device)
            found = controller.meet(target, max_trials)
            end = clock(image.device)
            rows.append({
                "image": name, "mode": mode, "target_bits": target.bits, "bits": found.bits,
                "error": found.bits / target.bits - 1, "index": found.index, "trials": controller.trials - 1,
                "seconds": end - start, "trial_seconds": (end - analysis_end) / controller.trials,
                "encode_seconds": encode_seconds,
            })
    return rows


def run(args: argparse.Namespace, write_json: Callable[[list], None]) -> int:
    """Measure the modes, and print the table; returns the exit status."""
    device = pick_device(args.device)
    paths = find_images_or_samples(args.data)
    model = load_model(args.checkpoint, device, variable_rate=True)
    print_weights(args.checkpoint)
    model.prepare()

    def work(name: str, image: Tensor, targets: int) -> list[dict]:
        quality_map = map_of_arguments(args, *image.shape[1:])
        return measure(model, name, image, targets, indexes=args.indexes, quality_map=quality_map)

    each = for_each(paths, [args.targets], device=device, work=work)
    found = [rows for _, _, rows in tqdm(each, total=len(paths), unit="image", disable=None) if rows]
    rows = [row for rows in found for row in rows]
    if not rows:
        raise cli.UserError("none of the pictures could be measured")
    print(f"{'mode':<15} mean |error| %  worst % highest % trials seconds trial/encode")
    for mode in MODES:
        chosen = [row for row in rows if row["mode"] == mode]
        errors = [100 * row["error"] for row in chosen]
        mean = statistics.mean(map(abs, errors))
        worst = max(errors, key=abs)
        trials, seconds = (statistics.mean(row[key] for row in chosen) for key in ("trials", "seconds"))
        share = statistics.median(row["trial_seconds"] / row["encode_seconds"] for row in chosen)
        print(f"{mode:<15} {mean:14.3f} {worst:8.2f} {max(errors):9.3f} {trials:6.2f} {seconds:7.2f} {share:12.2f}")
    print(f"{len(found)} pictures, {args.targets} targets each; on {torch.get_num_threads()} threads of {device}")
    write_json(rows)
    return 1 if len(found) < len(paths) else 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with json_output(args.json) as write_json:
        return run(args, write_json)


if __name__ == "__main__":
    cli.run(main)
