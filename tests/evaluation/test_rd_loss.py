import json

import numpy as np
import pytest
from PIL import Image

from models.lambdas import LADDER
from utils import cli
from utils.evaluation import rd_loss


def test_least_loss_takes_the_best_rate_for_each_lambda(tmp_path, capsys):
    # Two rates of two pictures: 1 bit at MSE 10 and 30, 2 bits at MSE 2 and a perfect copy.
    def psnr(error):
        return 10 * np.log10(255**2 / error)

    rows = [(0, 1.0, psnr(10)), (0, 1.0, psnr(30)), (5, 2.0, psnr(2)), (5, 2.0, None)]
    images = [{"index": index, "bpp": bpp, "psnr": value} for index, bpp, value in rows]
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"name": "tcm", "images": images}))
    rd_loss.main([str(file), "--plot", str(tmp_path / "plot.png")])
    expected = [min(1 + 20 * lmbda, 2 + lmbda) for lmbda in LADDER]
    told = capsys.readouterr().out.splitlines()[-1].split()[1:]
    assert [float(value) for value in told] == pytest.approx([*expected, np.mean(expected)], abs=6e-4)
    assert Image.open(tmp_path / "plot.png").width > 300


@pytest.mark.parametrize("content", ["", "{}", '{"name": "x", "images": []}', '{"name": "x", "images": [{"bpp": 1}]}'])
def test_what_is_no_result_is_named(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(cli.UserError, match="r.json"):
        rd_loss.main([str(tmp_path / "r.json")])
