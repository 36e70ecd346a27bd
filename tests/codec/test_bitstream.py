"""The file format: what it holds, what it refuses, and decoding on machines with other floating point."""

import contextlib
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from models.coding import portable, slice_coders, tables
from models.coding.portable import EPSILON, crc_of, pack_positions, unpack_positions
from models.coding.side_info import DecodingError, SideInfo
from models.coding.slice_coders import SliceDecoder, SliceEncoder
from models.coding.tables import open_stream, to_symbols
from utils.codec.bitstream import BitstreamError, CodedImage, pack, unpack
from utils.codec.decode import decode
from utils.codec.encode import EncodeRequest
from utils.codec.encode import encode as encode_picture
from utils.images import pad, to_float

ROOT = Path(__file__).parents[2]

SMALL = CodedImage(451, 300, 2.5, b"yyyyy", b"zz", b"weights!", SideInfo(b"list", 77))


def encode(model, picture: torch.Tensor, index: float) -> bytes:
    return encode_picture(model, picture, EncodeRequest(index)).data


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
    fixed = CodedImage(**vars(SMALL) | {"index": None})
    assert unpack(pack(fixed)) == fixed
    for other in (SMALL, fixed):
        gray = CodedImage(**vars(other) | {"gray": True})
        assert unpack(pack(gray)) == gray and len(pack(gray)) == len(data)


def test_what_is_no_file_is_refused():
    data = pack(SMALL)
    for wrong in (b"", b"TVBR", b"\x89PNG" * 20, data[:-1], data + b"x"):
        with pytest.raises(BitstreamError):
            unpack(wrong)
    for version in (1, 2, 9):
        with pytest.raises(BitstreamError, match=f"version {version} of the format; this program reads version 3"):
            unpack(data[:4] + bytes([version]) + data[5:])
    with pytest.raises(BitstreamError, match="newer program"):
        unpack(mended(data[:5] + b"\x82" + data[6:]))
    with pytest.raises(BitstreamError, match="65535×65535 is more than 268 megapixels"):
        unpack(mended(data[:6] + b"\xff" * 4 + data[10:]))
    for size in ((0, 5), (5, 65536)):
        with pytest.raises(ValueError, match="sides"):
            pack(CodedImage(**vars(SMALL) | dict(zip(("width", "height"), size, strict=True))))


def test_every_truncation_and_two_thousand_flips_are_noticed(tiny, picture):
    data = encode(tiny, picture, 0.0)
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            decode(tiny, data[:length])
    random = np.random.default_rng(0)
    for _ in range(2000):
        place, bit = random.integers(len(data)), random.integers(8)
        with pytest.raises(BitstreamError):
            decode(tiny, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
    for length in (1, 40, 1000):
        with pytest.raises(BitstreamError):
            decode(tiny, random.bytes(length))


def test_what_an_attacker_mends_is_noticed_too(tiny, picture):
    data = encode(tiny, picture, 0.0)
    random = np.random.default_rng(0)
    for place in random.integers(18, len(data), 60):  # lengths, list, CRC of the symbols, streams
        changed = mended(data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :])
        if changed != data:
            with pytest.raises((BitstreamError, DecodingError)):
                decode(tiny, changed)
    coded = unpack(data)
    for changes in (dict(z=b"", y=b""), dict(y=b""), dict(y=coded.y[:40]), dict(width=16000, height=16000)):
        with pytest.raises((BitstreamError, DecodingError)):
            decode(tiny, pack(CodedImage(**vars(coded) | changes)))


def test_an_index_beyond_the_table_is_not_used(tiny):
    """CompressAI's coder would read beyond its tables: a crash of the process."""
    shape, count = (tiny.M, 1, 1), tiny.M
    listed = bytes(portable.count_blocks(count)) + pack_positions(np.arange(count), np.ones(count, bool))
    parts = tiny.gaussian_conditional, tiny.coding_tables[0], [b"\x55" * 400]
    coder = SliceDecoder(*parts, count, [SideInfo(listed, 0)], [0])
    sigma = torch.full((1, *shape), 300.0)  # beyond the largest level
    assert coder(torch.zeros_like(sigma), sigma).isfinite().all()


def test_other_weights_are_noticed(tiny, picture):
    data = encode(tiny, picture, 1.0)
    with torch.no_grad():
        tiny.g_s[0].conv.bias[0] += 1e-3
    tiny.update(force=True)
    with pytest.raises(BitstreamError, match="other weights"):
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
    """Decode with σ and μ off by at most `size`, relatively, at random."""
    call, generator = SliceDecoder.__call__, torch.Generator().manual_seed(0)

    def noisy(self, mu, sigma):
        def off(x):
            return x * (1 + size * (2 * torch.rand(x.shape, generator=generator) - 1))

        return call(self, off(mu), off(sigma))

    monkeypatch.setattr(SliceDecoder, "__call__", noisy)


def test_a_shift_of_128_is_a_row_of_the_table(tiny):
    """As files have it (docs/bitstream.md), whatever the encoder chooses."""
    levels = tiny.gaussian_conditional.scale_table
    factor = portable.scale_factors(tiny.gaussian_conditional, np.full(1, 128, np.uint8), 0, 1)
    assert torch.allclose(levels[1:] * factor, levels[:-1], rtol=1e-4)


def test_the_shift_is_the_one_that_costs_fewest_bits(tiny, monkeypatch):
    """Against all 256, tried one after the other."""
    monkeypatch.setattr(portable, "BLOCK", 1000)
    monkeypatch.setattr(portable, "BLOCKS_AT_ONCE", 2)
    gaussian, lengths, epsilon = tiny.gaussian_conditional, tiny.coding_tables[0].code_lengths, 1e-4
    generator = torch.Generator().manual_seed(0)
    sigma = torch.exp(torch.empty(2500).uniform_(-4, 6, generator=generator))  # below and above all levels, too
    symbols = (torch.randn(2500, generator=generator) * sigma * torch.linspace(0.5, 1.2, 2500)).round().int()
    chosen = portable.choose_shifts(gaussian, lengths, symbols, sigma, epsilon)
    assert chosen.shape == (3,) and len(set(chosen.tolist())) == 3
    costs = torch.zeros(256, 3)
    for shift in range(256):
        moved = sigma * portable.scale_factors(gaussian, np.full(3, shift, np.uint8), 0, 2500)
        below, above = (portable.table_rows(gaussian, moved * factor) for factor in (1 - epsilon, 1 + epsilon))
        bits = lengths(symbols, portable.table_rows(gaussian, moved)) + 16 * (below != above)
        costs[shift] = torch.stack([part.sum() for part in bits.split(1000)])
    for block, shift in enumerate(chosen):
        assert costs[shift, block] <= costs[:, block].min() + 1e-2
    assert costs[chosen[0], 0] < costs[0, 0] - 10  # σ is too large there: the published rule costs more


def test_what_sigma_was_seen_to_differ_by_is_allowed_for_by_a_short_list(tiny):
    """4.6e-5 at most between settings of one machine (docs/performance.md); and a byte for 16,384 positions."""
    gaussian, count = tiny.gaussian_conditional, 2**18
    generator = torch.Generator().manual_seed(0)
    sigma = torch.exp(torch.empty(count).uniform_(-2, 4, generator=generator))
    symbols = (torch.randn(count, generator=generator) * sigma).round().int()
    picture = portable.PortableRows()
    rows = picture.add(gaussian, tiny.coding_tables[0].code_lengths, symbols, sigma, tiny.epsilon)
    shifts, positions, _ = portable.unpack_scales(picture.pack(), count)
    assert len(shifts) == count // 16384 and len(positions) < count / 1000
    sigma *= portable.scale_factors(gaussian, shifts, 0, count)
    for factor in (1 - 4.6e-5, 1 + 4.6e-5):
        differs = (portable.table_rows(gaussian, sigma * factor) != rows).nonzero().flatten().numpy()
        assert len(differs) and np.isin(differs, positions).all()


def test_shifts_are_chosen_for_a_million_positions_at_a_time(tiny):
    """Whatever the size of the picture: with what is computed of each it is the memory of tens of megabytes."""
    seen, count = [], 2**20 + 2**14

    def lengths(symbols, rows):
        seen.append(len(symbols))
        return torch.zeros(len(symbols))

    symbols, sigma = torch.zeros(count, dtype=torch.int32), torch.full((count,), 2.0)
    shifts = portable.choose_shifts(tiny.gaussian_conditional, lengths, symbols, sigma, EPSILON)
    assert len(shifts) == portable.count_blocks(count) and 2**19 < max(seen) <= 2**20


@pytest.mark.parametrize("epsilon", [EPSILON, 1e-3])
def test_decoding_with_other_floating_point(tiny, picture, monkeypatch, epsilon):
    tiny.epsilon = epsilon
    data = encode_picture(tiny, picture, EncodeRequest(2.0, nearest=True)).data  # how symbols were chosen is no matter
    expected = decode(tiny, data)
    disturbed(monkeypatch, epsilon / 2)
    for _ in range(5):
        difference = (decode(tiny, data).int() - expected.int()).abs()
        assert difference.max() <= 1  # μ itself is off, so the picture may be, by a rounding
    if epsilon == 1e-3:
        coded = unpack(data)
        shifts = coded.side_info.scales[: portable.count_blocks(y_count(tiny, picture))]
        assert len(coded.side_info.scales) > len(shifts) + 20
        with pytest.raises(DecodingError):  # without the list the same file does not survive
            decode(tiny, pack(CodedImage(**vars(coded) | {"side_info": SideInfo(shifts, coded.side_info.crc)})))
    with pytest.raises(DecodingError):  # nor does the published rule
        decode(tiny, published(tiny, picture))


def published(model, picture: torch.Tensor) -> bytes:
    """A file of the published rule: shifts of zero, no list, and the checksum of its symbols."""
    quantized = model.quantize(*latents(model, picture), portable=False)
    (y,), (z,) = model.encode_symbols(quantized)["strings"]
    shifts = bytes(portable.count_blocks(quantized.y.numel()))
    side_info = SideInfo(shifts, crc_of(quantized.y[0].int(), crc_of(quantized.z[0])))
    return pack(CodedImage(picture.shape[2], picture.shape[1], 2.0, y, z, model.fingerprint, side_info))


def latents(model, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        y, _ = model.analyze(pad(to_float(picture)), torch.tensor([2.0]))
        return y, model.h_a(y)


def test_the_largest_symbols_have_codes_and_larger_ones_are_refused(tiny):
    coder, largest = tiny.coding_tables[0], 2**24
    symbols = to_symbols(torch.tensor([largest, -largest]).repeat(500).float())
    stream = coder.to_stream(symbols, torch.zeros(1000, dtype=torch.int32))
    decoder = open_stream(stream, 1000)
    assert torch.equal(coder.from_stream(decoder, torch.zeros(1000, dtype=torch.int32)), symbols)
    assert len(stream) > 5 * 1000  # so that a stream of more than that need not be damaged, and one of seven is
    with pytest.raises(ValueError, match="too long for its 1000 symbols"):
        open_stream(bytes(7 * 1000), 1000)
    with pytest.raises(ValueError, match="cannot be coded"):
        to_symbols(torch.tensor([largest + 2.0]))


def test_the_coder_is_handed_four_million_symbols_at_a_time(tiny, monkeypatch):
    """It copies them more than once, and a large picture has hundreds of millions."""
    seen = []

    class Encoder:
        def encode_with_indexes(self, symbols, rows, *tables):
            seen.append(len(symbols))

        def flush(self):
            return b""

    monkeypatch.setattr(tables, "BufferedRansEncoder", Encoder)
    symbols = torch.zeros(2**22 + 1, dtype=torch.uint8)
    tiny.coding_tables[0].to_stream(symbols, symbols)
    assert sum(seen) == len(symbols) and 2**21 < max(seen) <= 2**22


def test_a_stream_of_ones_makes_the_coder_read_nothing_beyond_its_end():
    """Runs in another process: a decoder that reads beyond its stream may crash, and the other tests must go on."""
    program = """
import torch
from models.coding.tables import CodingTables, open_stream
from compressai.entropy_models import EntropyBottleneck
bottleneck = EntropyBottleneck(1)
bottleneck.update()
tables = CodingTables(bottleneck)
for symbols in (512, 7 * 10**5):
    try:
        tables.from_stream(open_stream(bytes([255]) * 4 * 10**6, symbols), torch.zeros(symbols, dtype=torch.int32))
        print("decoded")
    except ValueError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    few, many = run.stdout.splitlines()
    assert "too long for its" in few and many == "decoded"


def test_larger_differences_are_an_error(tiny, picture, monkeypatch):
    data = encode(tiny, picture, 2.0)
    disturbed(monkeypatch, 0.05)
    with pytest.raises(DecodingError, match="decoding went wrong"):
        decode(tiny, data)


def test_a_gpu_is_not_read_between_slices(tiny, picture, monkeypatch):
    """Encoding reads its symbols and indexes when it has those of all slices, each once."""
    y, z = latents(tiny, picture)
    events, cpu, call = [], torch.Tensor.cpu, SliceEncoder.__call__
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: events.append("read") or cpu(self))
    monkeypatch.setattr(SliceEncoder, "__call__", lambda self, *args: events.append("slice") or call(self, *args))
    quantized = tiny.quantize(y, z)
    assert events[: tiny.num_slices] == ["slice"] * tiny.num_slices and "slice" not in events[tiny.num_slices :]
    assert quantized.y_hat is None and 0 < events.count("read") < 10


def test_rows_below_are_looked_up_where_positions_are_listed(tiny, picture, monkeypatch):
    looked_up, table_rows = [], slice_coders.table_rows

    def counted(gaussian, sigma):
        looked_up.append(sigma.numel())
        return table_rows(gaussian, sigma)

    monkeypatch.setattr(slice_coders, "table_rows", counted)
    tiny.epsilon = 1e-3
    data = encode(tiny, picture, 2.0)
    looked_up.clear()
    decode(tiny, data)
    coded, count = unpack(data), y_count(tiny, picture)
    _, positions, _ = portable.unpack_scales(coded.side_info.scales, count)
    assert len(positions) and sum(looked_up) == count + len(positions)
