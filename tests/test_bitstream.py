"""The file format: what it holds, what it refuses, and decoding on machines with other floating point."""

import contextlib
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import skimage.data
import torch

from models.coding import Decode
from models.guard import DecodingError, Guard
from models.sensitive import EPSILON, pack_positions, unpack_positions
from utils import benchmark_decoding
from utils.bitstream import Coded, FileError, pack, unpack
from utils.checkpoint import BUNDLED
from utils.evaluation import decode, encode

SMALL = Coded(451, 300, 2.5, b"yyyyy", b"zz", b"weights!", Guard(b"list", 77))


@pytest.fixture
def picture() -> torch.Tensor:
    """A photograph, uint8 `[3, 200, 230]`."""
    return torch.from_numpy(skimage.data.astronaut()[:200, 100:330]).permute(2, 0, 1).contiguous()


def mended(data: bytes) -> bytes:
    """The file with a checksum that fits, as an attacker would write it."""
    return data[:34] + struct.pack("<I", zlib.crc32(data[38:], zlib.crc32(data[:34]))) + data[38:]


def test_a_file_returns_what_it_was_given():
    data = pack(SMALL)
    assert unpack(data) == SMALL and mended(data) == data
    assert len(data) == 38 + 5 + 2 + 4
    assert SMALL.shape == (6, 8)
    fixed = Coded(**vars(SMALL) | {"index": None})
    assert unpack(pack(fixed)) == fixed


def test_version_1_is_still_read(tiny, picture):
    coded = unpack(encode(tiny, picture, 1.5))
    old = struct.pack("<4sBHHfI", b"TVBR", 1, coded.width, coded.height, 1.5, len(coded.z)) + coded.z + coded.y
    assert torch.equal(decode(tiny, old), decode(tiny, encode(tiny, picture, 1.5)))


def test_what_is_no_file_is_refused():
    data = pack(SMALL)
    for wrong in (b"", b"TVBR", b"\x89PNG" * 20, data[:-1], data + b"x"):
        with pytest.raises(FileError):
            unpack(wrong)
    with pytest.raises(FileError, match="version 9"):
        unpack(data[:4] + b"\x09" + data[5:])
    with pytest.raises(FileError, match="newer program"):
        unpack(mended(data[:5] + b"\x82" + data[6:]))
    with pytest.raises(FileError, match="65535×65535 is more than 268 megapixels"):
        unpack(mended(data[:6] + b"\xff" * 4 + data[10:]))
    for size in ((0, 5), (5, 65536)):
        with pytest.raises(ValueError, match="sides"):
            pack(Coded(**vars(SMALL) | dict(zip(("width", "height"), size, strict=True))))


def test_every_truncation_and_two_thousand_flips_are_noticed(tiny, picture):
    data = encode(tiny, picture, 0.0)
    for length in range(len(data)):
        with pytest.raises(FileError):
            decode(tiny, data[:length])
    random = np.random.default_rng(0)
    for _ in range(2000):
        place, bit = random.integers(len(data)), random.integers(8)
        with pytest.raises(FileError):
            decode(tiny, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
    for length in (1, 40, 1000):
        with pytest.raises(FileError):
            decode(tiny, random.bytes(length))


def test_what_an_attacker_mends_is_noticed_too(tiny, picture):
    data = encode(tiny, picture, 0.0)
    random = np.random.default_rng(0)
    for place in random.integers(18, len(data), 60):  # lengths, list, CRC of the symbols, streams
        changed = mended(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        if changed != data:
            with pytest.raises((FileError, DecodingError)):
                decode(tiny, changed)
    coded = unpack(data)
    for changes in (dict(z=b"", y=b""), dict(y=b""), dict(y=coded.y[:40]), dict(width=16000, height=16000)):
        with pytest.raises((FileError, DecodingError)):
            decode(tiny, pack(Coded(**vars(coded) | changes)))


def test_other_weights_are_noticed(tiny, picture):
    data = encode(tiny, picture, 1.0)
    with torch.no_grad():
        tiny.g_s[0].conv.bias[0] += 1e-3
    tiny.update(force=True)
    with pytest.raises(FileError, match="other weights"):
        decode(tiny, data)


# Sensitive positions -------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 1e-4, 0.01, 0.5, 1])
def test_lists_of_positions(share):
    random = np.random.default_rng(0)
    positions = np.flatnonzero(random.random(20000) < share)
    above = random.random(len(positions)) < 0.5
    data = pack_positions(positions, above)
    for found, expected in zip(unpack_positions(data, 20000), (positions, above), strict=True):
        assert np.array_equal(found, expected)
    if share == 0.01:
        assert 8 * len(data) / len(positions) < np.log2(100) + 3  # entropy: 8.1 bits, and the side
    if share:
        with pytest.raises(ValueError, match="damaged"):
            unpack_positions(data, 10)
    for length in range(min(len(data), 50)):  # no list makes it fail otherwise
        with contextlib.suppress(ValueError):
            unpack_positions(random.bytes(length), 1000)


def disturbed(monkeypatch, size: float) -> None:
    """Decode with σ and μ off by up to so much, at random."""
    call, generator = Decode.__call__, torch.Generator().manual_seed(0)

    def noisy(self, mu, sigma):
        def off(x):
            return x * (1 + size * (2 * torch.rand(x.shape, generator=generator) - 1))

        return call(self, off(mu), off(sigma))

    monkeypatch.setattr(Decode, "__call__", noisy)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
def test_decoding_with_other_floating_point(tiny, picture, monkeypatch, epsilon):
    tiny.epsilon = epsilon
    data = encode(tiny, picture, 2.0)
    expected = decode(tiny, data)
    disturbed(monkeypatch, epsilon / 2)
    for _ in range(5):
        difference = (decode(tiny, data).int() - expected.int()).abs()
        assert difference.max() <= 1  # μ itself is off, so the picture may be, by a rounding
    if epsilon == 1e-3:
        without = unpack(data)
        assert len(without.guard.listed) > 20
        with pytest.raises(DecodingError):  # without the list the same file does not survive
            decode(tiny, pack(Coded(**vars(without) | {"guard": Guard(b"", without.guard.crc)})))


def test_larger_differences_are_an_error(tiny, picture, monkeypatch):
    data = encode(tiny, picture, 2.0)
    disturbed(monkeypatch, 0.05)
    with pytest.raises(DecodingError, match="decoding went wrong"):
        decode(tiny, data)


@pytest.mark.parametrize("compiled", [False, True])
def test_decoding_under_every_setting(photos, checkpoint, tmp_path, capsys, compiled):
    """Threads, memory format, attention kernel, oneDNN, precision, GPU: what was encoded is decoded."""
    if compiled and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    weights = checkpoint if compiled else str(BUNDLED)
    arguments = ["-d", str(photos / "p0.png"), "--crop", "128", "-l", "3", "--checkpoint", weights]
    benchmark_decoding.main([*arguments, "--json", str(tmp_path / "r.json")] + ["--compile"] * compiled)
    results = json.loads((tmp_path / "r.json").read_text())
    assert {"3 threads", "other memory format", "attention not fused", "without oneDNN", "float64"} < set(results)
    assert ("compiled" in results) == compiled
    for name, row in results.items():
        assert row["decoded"] == row["files"] == 1, name
        assert row["sigma_999"] <= row["sigma_largest"] < EPSILON, name
    assert results["float64"]["sigma_largest"] > 0
    assert "float64" in capsys.readouterr().out
