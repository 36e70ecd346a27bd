import json

import pytest

from utils.benchmarks import rate_control


def test_every_mode_is_measured_and_a_cap_is_kept(quick, photos, capsys):
    arguments = ["-d", str(photos / "p0.png"), "--checkpoint", quick, "--json", "-"]
    assert rate_control.main([*arguments, "--targets", "2"]) == 0
    output = capsys.readouterr()
    assert all(mode in output.err for mode in rate_control.MODES)
    rows = json.loads(output.out)
    assert len(rows) == 6 and all(row["error"] <= 0 for row in rows if row["mode"] == "not above")
    assert rate_control.main([*arguments, "--targets", "2", "--indexes", "1", "2"]) == 0
    within = json.loads(capsys.readouterr().out)
    whole, part = ([row["target_bits"] for row in found] for found in (rows, within))
    assert max(part) - min(part) < 0.3 * (max(whole) - min(whole))
    with pytest.raises(SystemExit):
        rate_control.main([*arguments, "--indexes", "2", "1"])


def test_a_picture_that_cannot_be_read_is_left_out(quick, photos, capsys):
    (photos / "p1.png").write_bytes(b"broken")
    pictures = [str(photos / f"p{i}.png") for i in range(2)]
    assert rate_control.main(["-d", *pictures, "--checkpoint", quick, "--targets", "1"]) == 1
    told = capsys.readouterr()
    assert "1 pictures, 1 targets each" in told.out and "p1.png: cannot be read" in told.err
