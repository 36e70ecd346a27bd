import re

from utils.benchmarks import training


def test_every_figure_is_printed(capsys):
    training.main(["--patch-size", "128", "-bs", "1", "--runs", "1"])
    output = capsys.readouterr().out
    (gmac,) = re.findall(r"GMAC per step, forward and backward +(\d+)", output)
    assert 5 <= int(gmac) <= 9  # 144 thousand per pixel forward, three times as many with the gradients
    for figure in ("patches per second", "forward pass", "GMAC", "peak memory"):
        assert figure in output
