import json
import re

import numpy as np
import pytest

from models.lambdas import LADDER
from utils import cli
from utils.evaluation import comparison
from utils.evaluation.results import Result, decibels, to_json


def psnr(error: float) -> float:
    return 10 * np.log10(255**2 / error)


def codec(name: str, *rates: list[Result]) -> dict:
    return json.loads(json.dumps(to_json(list(rates), name, "made up")))


def result(index: float, bpp: float, error: float, image: str = "a", ms_ssim: float | None = None) -> Result:
    return Result(image, 1000, 500, index, bpp, psnr(error) if error else np.inf, ms_ssim, None, None, 1.0, 2.0)


def test_least_loss_takes_the_best_rate_for_each_lambda():
    # Two rates of two pictures: 1 bit at MSE 10 and 30, 2 bits at MSE 2 and a perfect copy.
    rates = [[result(0, 1, 10), result(0, 1, 30, "b")], [result(5, 2, 2), result(5, 2, 0, "b")]]
    expected = [min(1 + 20 * lmbda, 2 + lmbda) for lmbda in LADDER]
    row = comparison.compare([codec("c", *rates)])["codecs"][0]
    assert row["least_loss"] == pytest.approx(expected) and row["mean_loss"] == pytest.approx(np.mean(expected))
    assert row["encode_seconds_per_megapixel"] == pytest.approx(2) and row["decode_seconds"] == pytest.approx(2)


def test_files_of_a_target_make_one_point_though_their_indexes_differ():
    """Two pictures, each with the index at which its file has the size that was asked for."""
    (point,) = comparison.points(codec("c", [result(1.25, 0.6, 10), result(3.75, 0.6, 30, "b")]))
    assert point.bpp == pytest.approx(0.6) and point.mse == pytest.approx(20) and point.quality == pytest.approx(2.5)


def test_there_is_no_ms_ssim_of_fewer_pictures_than_the_bits_are_of():
    small = codec("c", [result(0, 0.2, 10, ms_ssim=0.95), result(0, 2.0, 10, "thumbnail")])
    (point,) = comparison.points(small)
    assert point.ms_ssim is None and point.bpp == pytest.approx(1.1)
    assert "ms-ssim-rgb" not in small["results"]


def test_a_perfect_ms_ssim_has_no_place_on_a_curve():
    rates = [[result(i, 2.0**i, 10 / 2**i, ms_ssim=1 - (0.1 / 2**i if i < 4 else 0))] for i in range(5)]
    rows = comparison.compare([codec("one", *rates), codec("two", *rates)])["codecs"]
    assert rows[1]["bd_ms-ssim"]["rate"]["value"] == pytest.approx(0, abs=1e-6)


def test_rates_that_a_bd_rate_leaves_out_are_told():
    """The second rate of one codec has less quality than its first, for more bits."""
    errors = (80, 40, 20, 10, 5)
    one = codec("one", *[[result(i, 2**i / 10, error)] for i, error in enumerate(errors)])
    bent = codec("bent", *[[result(i, 2**i / 10, error)] for i, error in enumerate((80, 90, 20, 10, 5))])
    text = comparison.table(comparison.compare([one, bent]))
    assert "BD (psnr): without 1 rate of bent" in text and "rate of one" not in text
    text = comparison.table(comparison.compare([bent, one, one | {"name": "two"}]))
    assert text.count("without 1 rate of bent") == 1


def test_regions_have_no_loss():
    row = result(0, 1, 10)
    row.psnr_inside, row.psnr_outside = 40.0, 30.0
    assert comparison.compare([codec("c", [row])])["codecs"][0]["least_loss"] is None


def test_ms_ssim_is_averaged_before_it_becomes_decibels():
    (point,) = comparison.points(codec("c", [result(0, 1, 10, ms_ssim=0.9), result(0, 1, 10, "b", ms_ssim=0.98)]))
    assert comparison.ms_ssim_decibels(point) == pytest.approx(decibels(0.94))


def test_deltas_of_the_first_against_the_others():
    """Ten percent fewer bits at every quality; quality that hardly overlaps; and too few points."""
    errors = (80, 40, 20, 10, 5)
    first = codec("first", *[[result(i, 0.9 * 2**i / 10, e, ms_ssim=1 - e / 1000)] for i, e in enumerate(errors)])
    more = codec("more", *[[result(i, 2**i / 10, e, ms_ssim=1 - e / 1000)] for i, e in enumerate(errors)])
    far = codec("far", *[[result(i, 2**i / 10, e / 14)] for i, e in enumerate(errors)])
    few = codec("few", *[[result(i, 2**i / 10, e)] for i, e in enumerate(errors[:3])])
    whole = comparison.together([first, more, far, few], [])
    rows = {row["name"]: row for row in whole["summary"]["codecs"]}
    for metric in ("psnr", "ms-ssim"):
        assert rows["more"][f"bd_{metric}"]["rate"]["value"] == pytest.approx(-10, abs=0.01)
        assert rows["more"][f"bd_{metric}"]["rate"]["overlap"] == pytest.approx(1)
    assert rows["more"]["bd_psnr"]["quality"]["value"] > 0
    assert rows["far"]["bd_psnr"]["rate"]["value"] is None
    assert "of the shorter" in rows["far"]["bd_psnr"]["rate"]["reason"]
    assert "no ms-ssim" in rows["far"]["bd_ms-ssim"]["rate"]["reason"]
    assert "3 rising points" in rows["few"]["bd_psnr"]["rate"]["reason"]
    lines = comparison.table(whole["summary"]).splitlines()
    assert "-10.0" in lines[2] and len(lines) == 8 and "BD-rate against few: a curve has 3 rising" in lines[-1]
    assert [row["rates"] for row in whole["summary"]["codecs"]] == [5, 5, 5, 3]


def tcm(number: int, *images: str, metric: str = "mse") -> dict:
    """A TCM of one rate: the more bits the larger its number."""
    rows = [result(None, 2.0**number / 10, 80 / 2**number, image) for image in images]
    return codec(f"tcm{number}", rows) | {"metric": metric, "checkpoint": {"file": f"{number}", "fingerprint": "f"}}


def test_models_of_one_rate_are_joined_where_they_make_a_curve():
    variable = codec("vbr", *[[result(i, 2.0**i, 80 / 2**i)] for i in range(4)]) | {"metric": "mse"}
    four = [tcm(number, "a") for number in (3, 0, 2, 1)]
    others = [tcm(4, "a", "b"), *(tcm(number, "a", metric="ms-ssim") for number in range(4))]
    found = comparison.join_fixed_rates([four[0], variable, *four[1:], *others])
    names = ["4 fixed-rate TCMs", "vbr", "tcm4", "4 fixed-rate TCMs for MS-SSIM"]
    assert [one["name"] for one in found] == names
    assert [one["file"] for one in found[0]["checkpoints"]] == ["0", "1", "2", "3"]
    assert [point.bpp for point in comparison.points(found[0])] == [0.1, 0.2, 0.4, 0.8]
    assert comparison.join_fixed_rates(four[:3]) == four[:3]
    mixed = [one | {"model": "Hyperprior"} for one in four[:2]] + four[2:]
    assert comparison.join_fixed_rates(mixed) == mixed
    mixed = [one | {"arguments": {"N": 128, "means": number < 2}} for number, one in enumerate(four)]
    assert comparison.join_fixed_rates(mixed) == mixed
    (other,) = comparison.join_fixed_rates([one | {"model": "DepthConv"} for one in four])
    assert other["name"] == "4 fixed-rate DepthConvs"


def test_curves_of_other_weights_are_not_taken_for_one(tmp_path):
    """Joined curves of equally many TCMs have one name; a file that has been seen adds nothing."""
    curves = [comparison.join_fixed_rates([tcm(n, image) for n in range(4)])[0] for image in ("a", "b")]
    curves[1]["checkpoints"] = [one | {"fingerprint": "g"} for one in curves[1]["checkpoints"]]
    first = codec("vbr", [result(0, 1, 10)])
    for curve, name in zip((*curves, curves[1]), ("one", "two", "three"), strict=True):
        (tmp_path / name).write_text(json.dumps(first | {"name": name, "compared": [curve]}))
    files = [(name, comparison.read_codecs(str(tmp_path / name))) for name in ("one", "two", "three")]
    names = [one["name"] for one in comparison.together([], files)["compared"]]
    assert names == ["4 fixed-rate TCMs", "4 fixed-rate TCMs (two)", "two", "three"]  # "two" names no weights


def test_codecs_of_files_keep_apart_and_are_not_doubled(tmp_path, capsys):
    one, two = codec("model", [result(0, 1, 10)]), codec("model", [result(0, 2, 10, "b")])
    jpeg = codec("JPEG", [result(5, 1, 20)])
    for name, first in (("one", one), ("two", two)):
        (tmp_path / f"{name}.json").write_text(json.dumps(first | {"compared": [jpeg], "summary": {}, "made": {}}))
    files = [str(tmp_path / f"{name}.json") for name in ("one", "two")]
    whole = comparison.together([], [(file, comparison.read_codecs(file)) for file in files])
    assert [whole["name"], *(c["name"] for c in whole["compared"])] == ["model", "JPEG", "model (two)"]
    assert "other pictures" in capsys.readouterr().err
    others = codec("JPEG", [result(5, 1, 20, "b")])
    (tmp_path / "two.json").write_text(json.dumps(two | {"compared": [others], "summary": {}, "made": {}}))
    whole = comparison.together([], [(file, comparison.read_codecs(file)) for file in files])
    assert [c["name"] for c in whole["compared"]] == ["JPEG", "model (two)", "JPEG (two)"]


def test_compressais_own_files_are_read(tmp_path):
    curve = {"name": "bmshj", "description": "", "results": {"bpp": [0.5, 0.2], "psnr-rgb": [30.0, 27.0]}}
    (tmp_path / "c.json").write_text(json.dumps(curve))
    curve["results"]["psnr"] = curve["results"].pop("psnr-rgb")  # its other name
    (tmp_path / "d.json").write_text(json.dumps(curve))
    assert comparison.points(curve) == comparison.points(comparison.read_codecs(str(tmp_path / "d.json"))[0])
    (first,) = comparison.read_codecs(str(tmp_path / "c.json"))
    assert [(p.bpp, p.psnr) for p in comparison.points(first)] == [(0.2, 27.0), (0.5, 30.0)]


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", "[]", '{"name": "x", "images": []}', '{"name": "x", "images": [{"bpp": 1}]}'),
        '{"name": "x", "metric": "foo", "results": {"bpp": [1], "psnr": [30]}}',
        json.dumps({"name": "x", "images": [{"index": 0, "bpp": 1, "psnr": 3, "ms_ssim": None, "point": 0}]}),
    ],
)
def test_what_is_no_result_is_named(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(cli.UserError, match=r"r\.json"):
        comparison.read_codecs(str(tmp_path / "r.json"))


def test_published_curves_have_sources_and_are_for_kodak_alone():
    curves = comparison.published()
    for curve in curves:
        assert curve["source"] and curve["name"].endswith(" (published)")
        assert sorted(curve["results"]["bpp"]) == curve["results"]["bpp"]
    def kodak_at(index, bpp=1.0, quality=30.0):
        sides = ((512, 768) if i % 5 else (768, 512) for i in range(1, 25))
        return [Result(f"kodim{i:02}.png", *side, index, bpp, quality) for i, side in enumerate(sides, 1)]

    kodak = kodak_at(0)
    assert comparison.is_kodak(codec("c", kodak))
    assert comparison.together([codec("c", kodak)], [])["summary"]["codecs"][1:] == []  # one rate is no curve
    rates = [kodak_at(i, bpp, quality) for i, (bpp, quality) in enumerate(((0.2, 29), (0.4, 31.5), (0.7, 34), (1, 36)))]
    summary = comparison.together([codec("c", *rates)], [])["summary"]
    beside = summary["codecs"][1:]
    assert [row["name"] for row in beside] == [curve["name"] for curve in curves]
    assert all(row["published"] and row["least_loss"] is None for row in beside)  # a mean PSNR has no mean MSE
    assert all(abs(row["bd_psnr"]["rate"]["value"]) < 100 for row in beside)
    assert re.search(r"\nVTM \(published\) +(– +){7}8 +-?\d", comparison.table(summary))
    assert not comparison.is_kodak(codec("c", kodak[:8]))
    kodak[3].width = 600
    assert not comparison.is_kodak(codec("c", kodak))
