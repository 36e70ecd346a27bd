import json

from utils.benchmarks import rate_control


def test_every_mode_is_measured_and_a_cap_is_kept(varied_checkpoint, photos, tmp_path, capsys):
    file = tmp_path / "control.json"
    arguments = ["-d", str(photos / "p0.png"), "--checkpoint", varied_checkpoint, "--json", str(file)]
    rate_control.main([*arguments, "--targets", "2"])
    output = capsys.readouterr().out
    assert all(mode in output for mode in rate_control.MODES)
    rows = json.loads(file.read_text())
    assert len(rows) == 6 and all(row["error"] <= 0 for row in rows if row["mode"] == "not above")
