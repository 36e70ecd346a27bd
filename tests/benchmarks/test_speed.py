from utils.benchmarks import speed


def test_every_part_is_printed(capsys):
    speed.main(["--width", "128", "--height", "128", "--runs", "1"])
    output = capsys.readouterr().out
    for part in ("analysis + synthesis", "slices", "to bytes", "from bytes", "peak memory", "matrix product"):
        assert part in output
