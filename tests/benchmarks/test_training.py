from utils.benchmarks import training


def test_every_figure_is_printed(capsys):
    training.main(["--patch-size", "128", "-bs", "1", "--runs", "1"])
    output = capsys.readouterr().out
    for figure in ("patches per second", "forward pass", "GMAC", "peak memory"):
        assert figure in output
