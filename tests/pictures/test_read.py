"""What a picture becomes: colors, transparency, frames, samples and damaged metadata, against known constructions."""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageFile, features

from utils.pictures import ImageError, png_bytes, read_pixels
from utils.pictures.color import SRGB, TRANSFERS

COLORS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [200, 100, 50], [0, 0, 0]]], np.uint8)
P3 = Path(__file__).parent / "icc_p3.png"  # random colors with a profile of Display P3


@pytest.fixture
def smooth() -> Image.Image:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8))
    return small.resize((60, 50), Image.Resampling.BICUBIC)


def read(image: Image.Image | bytes, format: str = "PNG", **options) -> tuple[np.ndarray, list[str]]:
    """A picture as it is read from a file, and the notes."""
    file, notes = io.BytesIO(), []
    if not isinstance(image, bytes):
        image.save(file, format, **options)
        image = file.getvalue()
    return read_pixels(image, note=lambda text, once=False: notes.append(text)), notes


def png(image: Image.Image, *chunks: tuple[bytes, bytes], **options) -> bytes:
    """A PNG file with further chunks after its header."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    added = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return file.getvalue()[:33] + b"".join(added) + file.getvalue()[33:]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = Image.fromarray(COLORS)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(path)
    pixels = read_pixels(path)
    assert pixels.dtype == np.uint8 and pixels.shape == (2, 3, 3)
    if mode in ("RGB", "RGBA", "P", "CMYK"):
        assert np.array_equal(pixels, COLORS)
    else:
        gray = np.asarray(Image.fromarray(COLORS).convert(mode).convert("L"))
        assert all(np.array_equal(pixels[..., channel], gray) for channel in range(3))


@pytest.mark.parametrize("kind", ["png16", "tif16", "float"])
def test_deep_samples_are_scaled(tmp_path, kind):
    values = np.array([[0, 257 * 100], [257 * 200 + 100, 65535]])
    if kind == "float":
        Image.fromarray((values / 65535).astype(np.float32)).save(path := tmp_path / "x.tif")
    else:
        Image.fromarray(values.astype(np.uint16)).save(path := tmp_path / f"x.{kind[:3]}")
    assert read_pixels(path)[..., 0].tolist() == [[0, 100], [200, 255]]


def test_exif_rotation(tmp_path):
    image = Image.fromarray(COLORS)
    exif = image.getexif()
    exif[0x0112] = 6  # turn right to see it upright
    image.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_pixels(tmp_path / "x.png"), np.rot90(COLORS, -1))


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_broken_pictures_are_named_in_one_line(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(ImageError) as error:
        read_pixels(path)
    assert "bad.png" in str(error.value) and "\n" not in str(error.value)


def test_truncated_picture(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ImageError, match="cut.png"):
        read_pixels(path)


# Colors --------------------------------------------------------------------------------------


def test_a_color_profile_is_converted_as_imagecms_does():
    with Image.open(P3) as image:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        expected = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        as_it_is = np.asarray(image.convert("RGB"), int)
    found = read_pixels(P3)
    assert np.array_equal(found, np.asarray(expected))
    assert np.abs(found - as_it_is).max() > 10


def test_profiles_of_srgb_of_gray_and_damaged_ones(smooth):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read(smooth, icc_profile=srgb)[0], np.asarray(smooth))
    for profile in (b"no profile", srgb[:100], ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()):
        pixels, notes = read(smooth, icc_profile=profile)
        assert np.array_equal(pixels, np.asarray(smooth))
        assert len(notes) == 1 and "its color profile cannot be used" in notes[0]


def chroma(primaries) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(value * 1e5) for value in primaries))


P3_PRIMARIES = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)


def test_color_chunks_of_png(smooth):
    as_it_is = np.asarray(smooth)
    for chunks in (
        [(b"gAMA", struct.pack(">I", 45455))],
        [(b"gAMA", struct.pack(">I", 45455)), chroma(SRGB)],
        [(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100000))],  # sRGB comes first
        [(b"cICP", bytes([1, 13, 0, 1])), (b"gAMA", struct.pack(">I", 100000))],  # and cICP before all
    ):
        assert np.array_equal(read(png(smooth, *chunks))[0], as_it_is)
    linear, _ = read(png(smooth, (b"gAMA", struct.pack(">I", 100000))))
    light = as_it_is / 255
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(linear - 255 * encoded).max() <= 0.51
    by_number, _ = read(png(smooth, (b"cICP", bytes([12, 13, 0, 1]))))
    by_primaries, _ = read(png(smooth, chroma(P3_PRIMARIES)))
    assert np.array_equal(by_number, by_primaries) and not np.array_equal(by_number, as_it_is)
    pixels, notes = read(png(smooth, (b"cICP", bytes([9, 16, 0, 1]))))  # PQ
    assert np.array_equal(pixels, as_it_is) and "H.273: 9, 16" in notes[0]
    with Image.open(P3) as image:  # a PNG may have a profile for readers that do not know cICP
        profile = image.info["icc_profile"]
    both, _ = read(png(smooth, (b"cICP", bytes([1, 13, 0, 1])), icc_profile=profile))
    assert np.array_equal(both, as_it_is)
    only, _ = read(smooth, icc_profile=profile)
    unknown, notes = read(png(smooth, (b"cICP", bytes([9, 16, 0, 1])), icc_profile=profile))
    assert np.array_equal(unknown, only) and not np.array_equal(only, as_it_is) and not notes
    pixels, notes = read(png(smooth, (b"cICP", bytes([1]))))
    assert np.array_equal(pixels, as_it_is) and "cICP is broken" in notes[0]
    for kind, data in ((b"cHRM", bytes(32)), (b"cHRM", b"\0\1" * 16), (b"gAMA", bytes(4)), (b"gAMA", b"\xff" * 4)):
        pixels, notes = read(png(smooth, (kind, data)))
        assert np.array_equal(pixels, as_it_is) and notes == [
            "its color chunks make no sense: its samples are taken as sRGB"
        ]


def test_primaries_are_converted_as_imagecms_converts_a_profile_of_them():
    """The profile of the file is Display P3 with the transfer function of sRGB, as are these chunks."""
    with Image.open(P3) as image:
        bare = Image.fromarray(np.asarray(image.convert("RGB")))
    found, _ = read(png(bare, chroma(P3_PRIMARIES)))
    assert np.abs(found.astype(int) - read_pixels(P3)).max() <= 2


def test_transfer_functions_are_continuous_and_end_at_white():
    x = np.linspace(0, 1, 10001)
    for transfer in TRANSFERS.values():
        y = transfer(x)
        assert y[0] == 0 and y[-1] == pytest.approx(1) and np.diff(y).min() > -5e-5 and np.diff(y).max() < 1e-3


# Transparency, frames, samples ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_transparent_pixels_are_put_on_the_background(mode):
    alpha = np.array([[0, 128, 255]], np.uint8)
    black = Image.fromarray(np.dstack([np.zeros((1, 3, 3), np.uint8), alpha]), "RGBA")
    expected, options = [255, 127, 0], {}
    if mode == "LA":
        black = black.convert("LA")
    elif mode == "P":
        black, options = Image.fromarray(np.array([[1, 0, 0]], np.uint8)).convert("P"), {"transparency": 1}
        expected = [255, 0, 0]
    elif mode == "tRNS":
        black = Image.fromarray(np.array([[[9, 9, 9], [0, 0, 0], [0, 0, 0]]], np.uint8))
        options, expected = {"transparency": (9, 9, 9)}, [255, 0, 0]
    pixels, notes = read(black, **options)
    assert np.abs(pixels[0, :, 0].astype(int) - expected).max() <= 1
    assert len(notes) == 1 and "transparent pixels are put on white" in notes[0]
    file = io.BytesIO()
    black.save(file, "PNG", **options)
    assert read_pixels(file.getvalue(), background="#0000ff")[0, 0].tolist() == [0, 0, 255]


def test_opaque_alpha_says_nothing(smooth):
    pixels, notes = read(smooth.convert("RGBA"))
    assert np.array_equal(pixels, np.asarray(smooth)) and not notes


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP"])
def test_the_first_of_several_frames(smooth, format):
    others = [smooth.rotate(90), smooth.rotate(180)]
    options = {"lossless": True} if format == "WEBP" else {}
    pixels, notes = read(smooth, format, save_all=True, append_images=others, **options)
    assert "the first of 3 frames is used" in notes
    assert np.abs(pixels.astype(int) - np.asarray(smooth)).mean() < 12  # a GIF has 256 colors


def tiff16(values: np.ndarray, photometric: int, sample_format: int = 1) -> bytes:
    """A TIFF file of 16-bit gray samples, its ten tags written out."""
    height, width = values.shape
    pixels = values.astype("<u2").tobytes()
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, photometric), (273, 8 + 2 + 12 * 10 + 4), (277, 1)]
    tags += [(278, height), (279, len(pixels)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + pixels


def test_white_may_be_zero():
    values = np.array([[0, 257 * 100], [257 * 200, 65535]])
    assert read(tiff16(values, 1))[0][..., 0].tolist() == [[0, 100], [200, 255]]
    assert read(tiff16(values, 0))[0][..., 0].tolist() == [[255, 155], [55, 0]]


def test_12_bits_are_a_range_of_their_own():
    """Two samples in three bytes, as scanners write them."""
    values = [0, 1000, 2000, 4095]
    pixels = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2], strict=True))
    file = tiff16(np.zeros((1, 4)), 1).replace(struct.pack("<HHII", 258, 4, 1, 16), struct.pack("<HHII", 258, 4, 1, 12))
    file = file.replace(struct.pack("<HHII", 279, 4, 1, 8), struct.pack("<HHII", 279, 4, 1, 6))[:-8] + pixels
    assert read(file)[0][0, :, 0].tolist() == [0, 62, 125, 255]


def test_32_bits_are_refused():
    file = tiff16(np.array([[5, 0, 70000 - 2**16, 1]]), 1)  # the halves of two samples
    for tag, before, now in ((256, 4, 2), (258, 16, 32)):
        file = file.replace(struct.pack("<HHII", tag, 4, 1, before), struct.pack("<HHII", tag, 4, 1, now))
    with pytest.raises(ImageError, match="integer samples from 5 to 70000, whose range is not known"):
        read(file)


def test_signed_samples_are_refused():
    with pytest.raises(ImageError, match="signed samples, whose range is not known"):
        read(tiff16(np.array([[0, 32767]]), 1, sample_format=2))


def test_16_bits_in_planes_are_refused_or_right():
    """Pillow reads uncompressed ones as noise."""
    values = np.random.default_rng(0).integers(0, 2**16, (3, 20, 30), dtype=np.uint16)
    for compression, photometric in ((None, "rgb"), ("zlib", "rgb")):
        file = io.BytesIO()
        tifffile.imwrite(file, values, photometric=photometric, planarconfig="separate", compression=compression)
        if compression:
            expected = np.moveaxis(values, 0, 2) / 257
            assert np.abs(read(file.getvalue())[0] - expected).max() <= 1
        else:
            with pytest.raises(ImageError, match="16-bit colors in planes of their own"):
                read(file.getvalue())


def test_the_transparency_of_16_bits_is_that_of_8():
    for kind in (np.uint8, np.uint16):
        file = io.BytesIO()
        Image.fromarray(np.array([[0, 100]], kind) * kind(np.iinfo(kind).max // 255)).save(file, "PNG", transparency=0)
        pixels, notes = read(file.getvalue())
        assert pixels[..., 0].tolist() == [[255, 100]] and "its transparent pixels are put on white" in " ".join(notes)


def test_16_bit_samples_of_a_large_picture():
    """It is scaled in several parts; the last rows and the first are where they were."""
    values = np.random.default_rng(0).integers(0, 65536, (2900, 2900))
    pixels = read(tiff16(values, 1))[0]
    assert np.array_equal(pixels, np.rint(values / 257).astype(np.uint8)[..., None].repeat(3, 2))


@pytest.mark.parametrize("samples", [[[0.0, 200.0]], [[float("nan"), 0.5]], [[-0.5, 0.5]], [[float("inf"), 0.0]]])
def test_samples_of_unknown_range_are_refused(samples):
    file = io.BytesIO()
    Image.fromarray(np.array(samples, np.float32)).save(file, "TIFF")
    with pytest.raises(ImageError, match="samples"):
        read_pixels(file.getvalue())
    file = io.BytesIO()
    Image.fromarray(np.array([[5, 70000]], np.int32)).save(file, "TIFF")
    with pytest.raises(ImageError, match="it has signed samples, whose range is not known"):
        read_pixels(file.getvalue())


# Damage and attacks ----------------------------------------------------------------------------


def test_damaged_metadata_do_not_cost_the_picture(smooth):
    bomb = b"Comment\0\0" + zlib.compress(bytes(3 * 2**20))
    for chunk in ((b"zTXt", bomb), (b"eXIf", b"\0\x08\0\x02"), (b"iTXt", b"\xff\xff"), (b"iCCP", b"x\0\0no zlib")):
        pixels, _ = read(png(smooth, chunk))
        assert np.array_equal(pixels, np.asarray(smooth)), chunk[0]
    assert any("damaged" in note for note in read(png(smooth, (b"zTXt", bomb)))[1])
    file = io.BytesIO()
    smooth.save(file, "JPEG")
    jpeg = file.getvalue()
    for segment in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM", b"http://ns.adobe.com/xap/1.0/\0<x"):
        broken = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
        assert np.array_equal(read(broken)[0], read(jpeg)[0])


def test_warnings_of_libraries_are_notes(smooth, monkeypatch):
    load = Image.Image.getexif

    def warning(self):
        warnings.warn("tag 282 had too many entries", stacklevel=1)
        return load(self)

    monkeypatch.setattr(Image.Image, "getexif", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(smooth)[1] == ["tag 282 had too many entries"]


def test_a_picture_larger_than_memory_is_told_so(smooth, monkeypatch):
    def load(self):
        raise MemoryError

    data = png(smooth, (b"tEXt", b"Comment\0text"))  # which is not to blame
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageError, match=r"\(too large for the memory of this machine\)"):
        read_pixels(data)


def test_only_raster_formats_are_tried(smooth):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageError, match="not a picture of a known format"):
        read_pixels(eps)


def test_large_pictures_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as the scripts do, for pictures beyond Pillow's own limit

    def header(width, height):
        ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + ihdr + struct.pack(">I", zlib.crc32(b"IHDR" + ihdr))

    idat = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(ImageError, match="sides must lie in 1 … 65535 pixels, not 70000×2"):
        read_pixels(header(70000, 2) + idat)
    with pytest.raises(ImageError, match="30000×30000 is more than 268 megapixels"):
        read_pixels(header(30000, 30000) + idat)
    with pytest.raises(ImageError, match="more than 1 megapixels"):
        read_pixels(header(1000, 1100) + idat, max_pixels=10**6)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(
    "broken",
    [
        chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(80_000_000))), chunk(b"gAMA", b"\0"), chunk(b"cHRM", b"\0"),
        chunk(b"sRGB", b""), chunk(b"pHYs", b"\0"), chunk(b"acTL", b"1"), chunk(b"tRNS", b"1"), chunk(b"eXIf", b"zz"),
        chunk(b"iCCP", b"x\0\0no zlib"), chunk(b"iCCP", b"x\0\7"), chunk(b"iCCP", b"no end"),
    ],
    ids=["large iCCP", "gAMA", "cHRM", "sRGB", "pHYs", "acTL", "tRNS", "eXIf", "iCCP", "method", "name"],
)
def test_a_png_whose_ancillary_chunks_are_broken_is_read_with_a_note(broken):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    png, notes = png_bytes(pixels), []
    found = read_pixels(png[:33] + broken + png[33:], note=lambda text, once=False: notes.append(text))
    assert np.array_equal(found, pixels)
    assert len(notes) == 1 and "damaged and ignored" in notes[0] and "object at" not in notes[0]


@pytest.mark.parametrize(("bits", "value"), [(1, 0), (1, 1), (2, 1), (2, 3), (2, 9), (4, 15), (4, 0)])
def test_the_transparency_of_few_bits_is_that_of_8(bits, value):
    """A row of every gray level of a PNG with so many bits. Pillow scales the samples, but not the transparent one."""
    levels = 2**bits
    row = bytes([0]) + bytes(
        sum(level << (8 - bits * (i + 1)) for i, level in enumerate(range(at, min(at + 8 // bits, levels))))
        for at in range(0, levels, 8 // bits)
    )
    header = struct.pack(">IIBBBBB", levels, 1, bits, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", value))
    data += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    grays = [[level * 255 // (levels - 1)] * 3 for level in range(levels)]
    expected = [[255, 0, 0] if level == value % levels else gray for level, gray in enumerate(grays)]
    assert read_pixels(data, background="red").tolist() == [expected]


def gray_profile(gamma: float) -> bytes:
    """An ICC profile of one channel: white of D50 and a curve."""
    d50 = struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + d50, b"kTRC": struct.pack(">4sIIHH", b"curv", 0, 1, round(256 * gamma), 0)}
    start = 128 + 4 + 12 * len(tags)
    table, values = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(values), len(value))
        values += value
    header = struct.pack(">II4x4s4s4s", start + len(values), 0, b"mntr", b"GRAY", b"XYZ ")
    header = header[:8] + struct.pack(">I", 0x02100000) + header[12:] + bytes(12) + b"acsp" + bytes(28) + d50
    return header.ljust(128, b"\0") + table + values


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_gray_profile_is_for_gray_pictures_however_they_are_stored(mode):
    """As WebP has no gray ones, and a palette may be gray."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    profile = gray_profile(1.0)
    pixels, notes = read(ramp.convert(mode), icc_profile=profile)
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    expected = ImageCms.profileToProfile(ramp, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert not notes and np.array_equal(pixels, np.asarray(expected))
    assert abs(pixels[4, 0, 0] - 137) < 2  # of level 64, linear


def test_a_gray_profile_does_not_cost_a_picture_its_colors(smooth):
    as_it_is, _ = read(png(smooth))
    pixels, notes = read(png(smooth, icc_profile=gray_profile(1.0)))
    assert np.array_equal(pixels, as_it_is) and "it is of GRAY, the picture of RGB" in notes[0]


@pytest.mark.skipif(not features.check("avif"), reason="a Pillow without AVIF")
@pytest.mark.parametrize(("colors", "same"), [((1, 13), True), ((2, 2), True), ((1, 1), True), ((12, 13), False)])
def test_colors_of_avif_are_converted_as_those_of_png(smooth, colors, same):
    file = io.BytesIO()
    smooth.save(file, "AVIF", quality=100)
    data = file.getvalue()
    at = data.index(b"colrnclx") + 8
    told = data[:at] + struct.pack(">HH", *colors) + data[at + 4 :]
    plain, _ = read(data)
    pixels, notes = read(told)
    assert not notes and np.array_equal(pixels, plain) == same
    if not same:
        assert np.array_equal(pixels, read(png(Image.fromarray(plain), (b"cICP", bytes([*colors, 0, 1]))))[0])
    assert "H.273: 9, 16" in read(data[:at] + struct.pack(">HH", 9, 16) + data[at + 4 :])[1][0]


def test_pillows_guard_of_the_program_around_is_left_as_it_is():
    code = "from PIL import Image; before = Image.MAX_IMAGE_PIXELS; import utils.images\n"
    code += "assert Image.MAX_IMAGE_PIXELS == before > 0"
    subprocess.run([sys.executable, "-c", code], check=True)
