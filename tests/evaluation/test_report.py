"""The page of eval_vbr.py --report: what is in its file, and what a browser makes of it."""

import base64
import contextlib
import hashlib
import html.parser
import json
import os
import re
import shutil

import pytest
from PIL import Image

import eval_vbr
import online_training_vbr
from models import TCM
from models.lambdas import index_to_lambda
from tests.conftest import TINY
from utils import cli
from utils.checkpoint import export_model
from utils.evaluation.plots import rd_figure

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = "<img src=x onerror=alert(1)>&\"'.png"  # a name that must not become part of the page


@pytest.fixture(scope="module")
def report(made_photos, quick, tmp_path_factory):
    """A page of two pictures and two codecs, and its JSON."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "photos").mkdir()
    for number, name in enumerate(("p0.png", NASTY)):
        with Image.open(made_photos / f"p{number}.png") as picture:
            picture.resize((192, 192)).save(folder / "photos" / name)  # MS-SSIM needs more than 160
    arguments = ["-d", str(folder / "photos"), "--checkpoint", quick, "--anchors", "jpeg", "webp"]
    arguments += ["--per-image", "-l", "0", "1", "3", "5"]
    arguments += ["--json", str(folder / "rd.json"), "--report", str(folder / "page")]
    with contextlib.redirect_stdout(None):
        assert eval_vbr.main(arguments) == 0
    return folder / "page" / "index.html", json.loads((folder / "rd.json").read_text()), arguments


class Reader(html.parser.HTMLParser):
    """Tables as lists of rows of cells (text, value), and the addresses that are loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables, self.loaded, self.value, self.inside = [], [], None, False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert not any(name.startswith("on") for name in found) and "style" not in found
        self.loaded += [found[name] for name in ("src", "srcset") if name in found]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag == "td":
            self.tables[-1][-1].append(["", found.get("data-value")])
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1][0] += data


def test_the_page_needs_nothing_else_and_escapes_names(report):
    text = report[0].read_text()
    page = Reader(text)
    assert page.loaded and all(address.startswith("data:image/") for address in page.loaded)
    assert NASTY not in text and "&lt;img src=x onerror" in text
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    for name in ("rd_psnr", "rd_ms_ssim", "rate_model"):
        assert (report[0].parent / f"{name}.svg").read_text().startswith("<?xml")
        assert min(Image.open(report[0].parent / f"{name}.png").size) > 300


def test_every_figure_is_that_of_the_json(report):
    _, whole, _ = report
    tables = Reader(report[0].read_text()).tables
    keys = ("width", "height", "index", "bpp", "psnr", "ms_ssim_db", "loss")
    keys += ("encode_seconds", "decode_seconds")
    means, losses, deltas, speed, fits, pictures = [[row for row in table if row] for table in tables]
    rows = whole["images"]
    assert len(pictures) == len(rows) == 8
    for cells, row in zip(pictures, rows, strict=True):
        assert cells[1][0] == row["image"] and [float(value) for _, value in cells[2:]] == [row[key] for key in keys]
    for cells, bpp in zip(means, whole["results"]["bpp"], strict=True):
        assert float(cells[3][1]) == pytest.approx(bpp)
        assert float(cells[2][1]) == pytest.approx(index_to_lambda(float(cells[1][1])))
    codecs = whole["summary"]["codecs"]
    assert [c["name"] for c in codecs][1:] == ["JPEG 4:2:0", "WebP"]
    for cells, codec in zip(losses, codecs, strict=True):
        assert [float(value) for _, value in cells[1:]] == [*codec["least_loss"], codec["mean_loss"]]
    for cells, codec in zip(speed, codecs, strict=True):
        assert float(cells[1][1]) == codec["encode_seconds"]
    expected = [codec[f"bd_{metric}"]["rate"]["value"] for codec in codecs[1:] for metric in ("psnr", "ms-ssim")]
    assert [value and float(value) for _, value in (cells[2] for cells in deltas)] == expected
    assert float(fits[1][2][1]) == whole["rate_model"]["means"]["entropy"]["r2"]
    for table in tables:
        for text, value in (cell for row in table for cell in row):
            if value is not None:  # what is shown is the value, rounded
                digits = len(text.partition(".")[2])
                assert float(text) == pytest.approx(float(value), abs=0.5 * 10.0**-digits + 1e-12)


def test_the_same_command_gives_the_same_json_but_for_times(report, tmp_path):
    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if not re.search("seconds|_time$|date|command", k)}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    _, whole, arguments = report
    arguments = [*arguments[: arguments.index("--json")], "--json", str(tmp_path / "again.json")]
    eval_vbr.main(arguments)
    again = json.loads((tmp_path / "again.json").read_text())
    whole = {key: value for key, value in whole.items() if key != "rate_model"}  # of the page alone
    assert timeless(again) == timeless(whole)
    assert whole["made"]["versions"]["torch"] and len(whole["checkpoint"]["fingerprint"]) >= 16


def test_what_is_wrong_is_said_before_anything_is_measured(
    report, made_photos, quick, tmp_path, monkeypatch
):
    monkeypatch.setattr(eval_vbr, "measure", None)  # which would fail
    arguments = report[2][: report[2].index("--json")]
    (tmp_path / "file").write_text("")
    for more in (["--compare", str(tmp_path / "none.json")], ["--report", str(tmp_path / "file")]):
        with pytest.raises((cli.UserError, OSError), match=re.escape(more[1])):
            eval_vbr.main([*arguments, *more])
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        eval_vbr.main([*arguments, "--json", str(tmp_path / "file" / "r.json")])
    export_model(tmp_path / "tcm.pth.tar", TCM(**TINY).eval(), [])
    with pytest.raises(cli.UserError, match="knows no regions"):
        both = ["--checkpoint", quick, str(tmp_path / "tcm.pth.tar")]
        eval_vbr.main(["-d", str(made_photos), *both, "--roi", "0,0,64,64", "--mask-index", "4"])
    with pytest.raises(cli.UserError, match="p1.png: not one of the pictures"):
        eval_vbr.main([*arguments, "--report", str(tmp_path / "page"), "--show", str(made_photos / "p1.png")])


def test_names_that_are_no_utf8_and_look_like_formulas(made_photos, quick, tmp_path):
    name = os.fsdecode(b"_a$_{$\xff.png")
    shutil.copy(made_photos / "p0.png", tmp_path / name)
    arguments = ["-d", str(tmp_path / name), "--checkpoint", quick, "--report", str(tmp_path / "page")]
    with contextlib.redirect_stdout(None):  # whose encoding cli.run takes care of
        assert online_training_vbr.main([*arguments, "-t", "1", "-l", "1"]) == 0
    assert r"_a$_{$\udcff.png" in (tmp_path / "page" / "index.html").read_text()


def test_files_alone_make_a_page_too(report, tmp_path, capsys):
    file = report[0].parent.parent / "rd.json"
    assert eval_vbr.main(["--compare", str(file), "--report", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "index.html").read_text()
    assert "WebP" in text and 'class="viewer"' not in text
    assert "WebP" in capsys.readouterr().out


def test_the_page_begins_with_the_bits_at_equal_quality(tmp_path):
    files = [tmp_path / f"{name}.json" for name in ("ours", "the-better", "the-worse", "other")]
    rates, first = ([2, 4, 8, 16], [1.6, 3.2, 6.4, 12.8], [2.5, 5, 10, 20], [2, 4, 8, 16]), (30, 30, 30, 60)
    for file, bpp, psnr in zip(files, rates, first, strict=True):
        curve = {"bpp": bpp, "psnr-rgb": [psnr + 3 * i for i in range(4)]}
        file.write_text(json.dumps({"name": file.stem, "description": "made up", "results": curve}))
    assert eval_vbr.main(["--compare", *map(str, files), "--report", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "index.html").read_text()
    assert "Bits at equal PSNR (BD-rate): +25.0 % against the-better, −20.0 % against the-worse.<" in text


@pytest.mark.parametrize(("length", "columns"), [(1, 3), (30, 2), (90, 1)])
def test_no_name_of_a_plot_is_cut_off(length, columns):
    names = [letter * length for letter in "abc"]
    curve = {"bpp": [0.5, 1], "psnr-rgb": [30, 33]}
    figure = rd_figure([{"name": name, "results": curve} for name in names], [], [], "psnr")
    (legend,) = figure.legends
    assert legend._ncols == columns
    if columns > 1:
        assert 0 <= legend.get_window_extent().x0 < legend.get_window_extent().x1 <= figure.bbox.width


def test_refinement_and_targets_have_a_page(made_photos, quick, tmp_path, capsys):
    arguments = ["-d", str(made_photos / "p0.png"), str(made_photos / "p1.png"), "--checkpoint", quick]
    arguments += ["-t", "2", "--target-bpp", "3", "--report", str(tmp_path), "--json", str(tmp_path / "o.json")]
    assert online_training_vbr.main(arguments) == 0
    whole = json.loads((tmp_path / "o.json").read_text())
    tables = Reader((tmp_path / "index.html").read_text()).tables
    targets, pictures = [[row for row in table if row] for table in tables]
    assert [float(cells[3][1]) for cells in targets] == pytest.approx([100 * row["error"] for row in whole["images"]])
    assert len(pictures) == 2
    for name in ("steps", "targets"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 300


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_without_complaint(report, width, scheme):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        complaints, requests = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report[0].as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll, the page does not
        assert page.evaluate("[...document.images].filter(i => !i.hidden).every(i => i.naturalWidth > 0)")
        stage, divider = page.locator(".stage").first, page.locator(".stage input").first
        cut = "getComputedStyle(document.querySelector('.stage')).getPropertyValue('--cut')"
        assert page.evaluate(cut) == "50%"
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 40)
        page.mouse.up()
        assert 80 <= float(page.evaluate(cut)[:-1]) <= 95
        divider.focus()
        page.keyboard.press("Home")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.evaluate(cut) == "3%"
        before = page.locator(".note-left").first.text_content()
        page.locator(".viewer select").first.select_option("original")
        assert "original" in page.locator(".note-left").first.text_content() != before
        page.locator(".viewer select").nth(1).select_option("original")  # both sides the same
        assert page.locator(".stage").first.locator("img:not([hidden])").count() == 2
        table = page.locator("table").last
        heading = table.locator("th button", has_text="bpp")
        for descending in (False, True):
            heading.click()
            column = table.locator("tbody td:nth-child(6)").all_text_contents()
            assert column == sorted(column, key=float, reverse=descending)
        assert {url for url in requests if not url.startswith("data:")} == {report[0].as_uri()}
        assert complaints == []
        browser.close()
