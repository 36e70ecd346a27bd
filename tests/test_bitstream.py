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

from models import sensitive
from models.coding import Decode
from models.guard import DecodingError, Guard
from models.sensitive import EPSILON, crc_of, pack_positions, unpack_positions
from utils import benchmark_decoding
from utils.bitstream import Coded, FileError, pack, unpack
from utils.checkpoint import BUNDLED
from utils.evaluation import decode, encode
from utils.images import pad, to_float

SMALL = Coded(451, 300, 2.5, b"yyyyy", b"zz", b"weights!", Guard(b"list", 77))


@pytest.fixture
def picture() -> torch.Tensor:
    """A photograph, uint8 `[3, 200, 230]`."""
    return torch.from_numpy(skimage.data.astronaut()[:200, 100:330]).permute(2, 0, 1).contiguous()


def y_count(model, picture: torch.Tensor) -> int:
    """Elements of y."""
    return model(pad(to_float(picture)), 0.0)["latent"].numel()


def mended(data: bytes) -> bytes:
    """The file with a checksum that fits, as an attacker would write it."""
    return data[:34] + struct.pack("<I", zlib.crc32(data[38:], zlib.crc32(data[:34]))) + data[38:]


def test_a_file_returns_what_it_was_given():
    data = pack(SMALL)
    assert unpack(data) == SMALL and mended(data) == data
    assert len(data) == 38 + 5 + 2 + 4 and data[4] == 3
    assert SMALL.shape == (6, 8)
    unshifted = Coded(**vars(SMALL) | {"guard": Guard(b"list", 77, shifted=False)})
    assert unpack(pack(unshifted)) == unshifted and pack(unshifted)[4] == 2
    fixed = Coded(**vars(SMALL) | {"index": None})
    assert unpack(pack(fixed)) == fixed


def test_older_versions_are_still_read(tiny, picture, monkeypatch):
    expected = decode(tiny, encode(tiny, picture, 1.5))
    coded = tiny.compress(pad(to_float(picture)), 1.5)  # by the published rule
    (y,), (z,) = coded["strings"]
    height, width = picture.shape[1:]
    version_1 = struct.pack("<4sBHHfI", b"TVBR", 1, width, height, 1.5, len(z)) + z + y
    assert torch.equal(decode(tiny, version_1), expected)
    count = y_count(tiny, picture)
    monkeypatch.setattr(sensitive, "choose_shifts", lambda *_: np.zeros(sensitive.blocks(count), np.uint8))
    coded = unpack(encode(tiny, picture, 1.5))
    assert coded.y == y
    guard = Guard(coded.guard.listed[sensitive.blocks(count) :], coded.guard.crc, shifted=False)
    assert guard.listed
    version_2 = pack(Coded(**vars(coded) | {"guard": guard}))
    assert version_2[4] == 2 and torch.equal(decode(tiny, version_2), expected)


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


def test_a_row_that_is_not_there_is_not_taken(tiny):
    """CompressAI's coder would read beyond its tables: a crash of the process."""
    shape, count = (tiny.M, 1, 1), tiny.M
    listed = bytes(sensitive.blocks(count)) + pack_positions(np.arange(count), np.ones(count, bool))
    coder = Decode(tiny.gaussian_conditional, tiny.tables[0], [b"\x55" * 400], shape, [Guard(listed, 0)], [0])
    sigma = torch.full((1, *shape), 300.0)  # beyond the largest level
    assert coder(torch.zeros_like(sigma), sigma).isfinite().all()


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


def test_the_shift_is_the_one_that_costs_fewest_bits(tiny, monkeypatch):
    """Against all 256, tried one after the other."""
    monkeypatch.setattr(sensitive, "BLOCK", 1000)
    monkeypatch.setattr(sensitive, "AT_ONCE", 2)
    gaussian, lengths, epsilon = tiny.gaussian_conditional, tiny.tables[0].code_lengths, 1e-4
    generator = torch.Generator().manual_seed(0)
    sigma = torch.exp(torch.empty(2500).uniform_(-4, 6, generator=generator))  # below and above all levels, too
    symbols = (torch.randn(2500, generator=generator) * sigma * torch.linspace(0.5, 1.2, 2500)).round().int()
    chosen = sensitive.choose_shifts(gaussian, lengths, symbols, sigma, epsilon)
    assert chosen.shape == (3,) and len(set(chosen.tolist())) == 3
    costs = torch.zeros(256, 3)
    for shift in range(256):
        moved = sigma * sensitive.factors(gaussian, np.full(3, shift, np.uint8), 2500)
        rows, near, _ = sensitive._table_index_and_sides(gaussian, moved, epsilon)
        bits = lengths(symbols, rows) + 16 * near
        costs[shift] = torch.stack([part.sum() for part in bits.split(1000)])
    for block, shift in enumerate(chosen):
        assert costs[shift, block] <= costs[:, block].min() + 1e-2
    assert costs[chosen[0], 0] < costs[0, 0] - 10  # σ is too large there: the published rule costs more


@pytest.mark.parametrize("epsilon", [EPSILON, 1e-3])
def test_decoding_with_other_floating_point(tiny, picture, monkeypatch, epsilon):
    tiny.epsilon = epsilon
    data = encode(tiny, picture, 2.0)
    expected = decode(tiny, data)
    disturbed(monkeypatch, epsilon / 2)
    for _ in range(5):
        difference = (decode(tiny, data).int() - expected.int()).abs()
        assert difference.max() <= 1  # μ itself is off, so the picture may be, by a rounding
    if epsilon == 1e-3:
        coded = unpack(data)
        shifts = coded.guard.listed[: sensitive.blocks(y_count(tiny, picture))]
        assert len(coded.guard.listed) > len(shifts) + 20
        with pytest.raises(DecodingError):  # without the list the same file does not survive
            decode(tiny, pack(Coded(**vars(coded) | {"guard": Guard(shifts, coded.guard.crc)})))
    with pytest.raises(DecodingError):  # nor does the published rule
        decode(tiny, published(tiny, picture))


def published(model, picture: torch.Tensor) -> bytes:
    """A file of the published rule, with the checksum of its symbols and nothing else."""
    quantised = model.quantise(*latents(model, picture), guarded=False)
    coded = model.code(quantised)
    (y,), (z,) = coded["strings"]
    guard = Guard(b"", crc_of(quantised.symbols[0], crc_of(quantised.z[0])), shifted=False)
    return pack(Coded(picture.shape[2], picture.shape[1], 2.0, y, z, model.fingerprint, guard))


def latents(model, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        y, _ = model.analyze(pad(to_float(picture)), torch.tensor([2.0]))
        return y, model.h_a(y)


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
