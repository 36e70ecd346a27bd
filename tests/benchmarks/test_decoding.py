import json

import torch

from models.coding.portable import EPSILON
from utils.benchmarks import decoding


def test_files_decode_under_every_setting(quick, photos, tmp_path):
    threads, file = torch.get_num_threads(), tmp_path / "decoding.json"
    arguments = ["-d", str(photos / "p0.png"), "--crop", "128", "-l", "2", "--checkpoint", quick]
    decoding.main([*arguments, "--json", str(file)])
    assert torch.get_num_threads() == threads
    results = json.loads(file.read_text())
    assert {"3 threads", "other memory format", "attention not fused", "without oneDNN", "float64"} <= set(results)
    for figures in results.values():
        assert figures["decoded"] == figures["files"] == 1
        assert figures["sigma_999"] <= figures["sigma_largest"] < EPSILON
    assert results["float64"]["mu_largest"] > 0
