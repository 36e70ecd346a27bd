import json

import pytest

from utils import cli
from utils.evaluation import bd_rate
from utils.evaluation.comparison import read_codecs


def test_bd_rate_joins_files_and_leaves_out_what_is_beaten(tmp_path, capsys):
    def write(name, points):
        bpp, psnr = map(list, zip(*points, strict=True))
        (tmp_path / name).write_text(json.dumps({"results": {"bpp": bpp, "psnr-rgb": psnr}}))
        return str(tmp_path / name)

    curve = [(0.1, 28.0), (0.2, 31.0), (0.4, 34.0), (0.8, 37.0), (1.6, 40.0)]
    singles = [write(f"{number}.json", [point]) for number, point in enumerate(curve)]
    test = write("test.json", [(0.9 * bpp, psnr) for bpp, psnr in curve] + [(1.0, 30.0)])
    bd_rate.main(["--anchor", *singles, "--test", test])
    output = capsys.readouterr().out
    assert "BD-rate: -10.00 %" in output
    assert "left out, beaten by a cheaper point: 1.0000 bpp 30.00 dB" in output
    with pytest.raises(cli.UserError, match="4 rising points"):
        bd_rate.main(["--anchor", *singles[:3], "--test", test])
    high = write("high.json", [(bpp, psnr + 20) for bpp, psnr in curve])
    bd_rate.main(["--anchor", *singles, "--test", high])
    output = capsys.readouterr().out
    assert "BD-rate: none, no quality in common" in output and "BD-psnr: +20.00 dB" in output
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(cli.UserError, match="broken.json"):
        bd_rate.main(["--anchor", str(broken), "--test", test])


def test_perfect_copies_are_left_out(tmp_path, capsys):
    """Our JSON has null for an infinite PSNR."""
    bpp, psnr = [0.1, 0.2, 0.4, 0.8, 5.0], [28.0, 31.0, 34.0, 37.0, None]
    (tmp_path / "a.json").write_text(json.dumps({"results": {"bpp": bpp, "psnr-rgb": psnr}}))
    bd_rate.main(["--anchor", str(tmp_path / "a.json"), "--test", str(tmp_path / "a.json")])
    assert "BD-rate: +0.00 %" in capsys.readouterr().out


@pytest.mark.parametrize("bpp", [0, -0.1])
def test_rates_that_are_not_positive_are_named(bpp, tmp_path):
    results = {"bpp": [bpp, 0.3, 0.5, 0.8, 1.2], "psnr-rgb": [28.0, 29.5, 32.0, 34.0, 36.0]}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"name": "x", "results": results}))
    for read in (lambda: bd_rate.main(["--anchor", str(file), "--test", str(file)]), lambda: read_codecs(str(file))):
        with pytest.raises(cli.UserError, match=f"results.json: .*a rate of {bpp:g} bpp"):
            read()


def test_json_with_a_mark_of_its_bytes_is_read(tmp_path, capsys):
    results = {"bpp": [0.1, 0.3, 0.5, 0.8], "psnr-rgb": [28.0, 29.5, 32.0, 34.0]}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"name": "x", "results": results}), "utf-8-sig")
    bd_rate.main(["--anchor", str(file), "--test", str(file)])
    assert "BD-rate: +0.00 %" in capsys.readouterr().out and read_codecs(str(file))


def test_other_pictures_are_noted(tmp_path, capsys):
    results = {"bpp": [0.1, 0.3, 0.5, 0.8], "psnr-rgb": [28.0, 29.5, 32.0, 34.0]}
    for name, pictures in (("a", ["x", "y"]), ("b", ["y", "x"]), ("c", ["x"]), ("d", None)):
        images = {} if pictures is None else {"images": [{"image": picture} for picture in pictures]}
        (tmp_path / name).write_text(json.dumps({"name": name, "results": results} | images))
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    bd_rate.main(["--anchor", a, d, "--test", b])
    assert not capsys.readouterr().err
    bd_rate.main(["--anchor", a, "--test", d, c])
    assert capsys.readouterr().err == f"note: {c}: measured on other pictures than {a}\n"
