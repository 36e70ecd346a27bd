"""What photographs do not have, for training: halftones, text, line art, mosaics, stripes, noise, flat colors.

A network that has seen photographs alone may do anything to the rest. Each patch that is chosen gets a rectangle of one
kind, so that it meets a photograph at its edges, as on a page or a screen.
"""

import string
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Pixels = np.ndarray  # uint8 [h, w, 3]
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "


def add_synthetic(patch: Tensor, random: np.random.Generator) -> Tensor:
    """A patch, uint8 `[3, h, w]`, with a rectangle of one of KINDS, which is all of it in half of the cases."""
    pixels = patch.cpu().permute(1, 2, 0).numpy().copy()
    top = left = 0
    bottom, right = pixels.shape[:2]
    if random.random() < 0.5:
        (top, bottom), (left, right) = (_part(side, random) for side in pixels.shape[:2])
    kind = KINDS[random.integers(len(KINDS))]
    pixels[top:bottom, left:right] = kind(pixels[top:bottom, left:right], random)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(patch.device)


def _part(side: int, random: np.random.Generator) -> tuple[int, int]:
    """The ends of a random part of at least a quarter of a side."""
    length = int(random.integers(side // 4, side))
    start = int(random.integers(side - length + 1))
    return start, start + length


def _two_colors(random: np.random.Generator) -> Pixels:
    """uint8 `[2, 3]`, black and white in half of the cases."""
    if random.random() < 0.5:
        return np.array([[0, 0, 0], [255, 255, 255]], np.uint8)[random.permutation(2)]
    return random.integers(0, 256, (2, 3), dtype=np.uint8)


def halftone(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Error diffusion to black and white, or to the eight colors of one bit per channel."""
    image = Image.fromarray(pixels)
    if random.random() < 0.5:
        return np.asarray(image.convert("1").convert("RGB"))
    return np.stack([np.asarray(band.convert("1").convert("L")) for band in image.split()], -1)


def mosaic(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """The raw picture of a sensor with Bayer's color filters."""
    out = np.zeros_like(pixels)
    for (y, x), channel in zip(((0, 0), (0, 1), (1, 0), (1, 1)), (0, 1, 1, 2), strict=True):
        out[y::2, x::2, channel] = pixels[y::2, x::2, channel]
    return out


def gaussian_noise(pixels: Pixels, random: np.random.Generator) -> Pixels:
    noisy = pixels + random.normal(0, random.uniform(10, 120), pixels.shape)
    return noisy.clip(0, 255).round().astype(np.uint8)


def impulse_noise(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Salt and pepper, in all channels at once or in each by itself."""
    shape = (*pixels.shape[:2], 3 if random.random() < 0.5 else 1)
    hit = random.random(shape) < random.uniform(0.01, 0.5)
    return np.where(hit, 255 * random.integers(0, 2, shape), pixels).astype(np.uint8)


def text(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Lines of text on a page, or on the photograph; sometimes with the colors of subpixel rendering."""
    ink, page = (tuple(map(int, color)) for color in _two_colors(random))
    height, width = pixels.shape[:2]
    over = random.random() < 0.3
    image = Image.fromarray(pixels) if over else Image.new("RGB", (width, height), page)
    size = int(random.integers(8, 33))
    font = ImageFont.load_default(size)
    draw = ImageDraw.Draw(image)
    for top in range(int(random.integers(size)), height, round(1.25 * size)):
        line = "".join(random.choice(list(CHARACTERS), width // 3 + 1))
        draw.text((int(random.integers(-20, 20)), top), line, ink, font=font)
    out = np.asarray(image)
    return _shift_channels(out, 1) if random.random() < 0.2 else out


def line_art(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Lines, rectangles and ellipses of random colors on a page."""
    height, width = pixels.shape[:2]
    image = Image.new("RGB", (width, height), tuple(map(int, _two_colors(random)[0])))
    draw = ImageDraw.Draw(image)
    for _ in range(random.integers(5, 60)):
        x0, x1 = sorted(random.integers(-10, width + 10, 2).tolist())
        y0, y1 = sorted(random.integers(-10, height + 10, 2).tolist())
        color = tuple(map(int, _two_colors(random)[0]))
        thickness = int(random.integers(1, 5))
        if random.random() < 0.5:
            draw.line((x0, y0, x1, y1) if random.random() < 0.5 else (x0, y1, x1, y0), color, thickness)
        else:
            shape = draw.rectangle if random.random() < 0.5 else draw.ellipse
            shape((x0, y0, x1, y1), None if random.random() < 0.5 else color, color, thickness)
    return np.asarray(image)


def stripes(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """A grating of two colors and any direction, with sharp edges or a sine's."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[:height, :width]
    angle = random.choice([0, np.pi / 2, np.pi / 4, random.uniform(0, np.pi)])
    wave = np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / random.uniform(2, 24) + random.uniform(0, 7))
    share = (0.5 + 0.5 * wave if random.random() < 0.3 else wave > random.uniform(-0.7, 0.7))[..., None]
    one, other = _two_colors(random).astype(float)
    return (one * share + other * (1 - share)).round().astype(np.uint8)


def blocks(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Squares of few colors, down to single pixels: checkers, codes to be scanned, noise of full contrast."""
    side = int(random.integers(1, 17))
    colors = random.integers(0, 256, (random.integers(2, 9), 3), dtype=np.uint8)
    colors[:2] = _two_colors(random)
    rows, cols = (-(-length // side) for length in pixels.shape[:2])
    grid = random.integers(len(colors), size=(rows, cols))
    if random.random() < 0.2:
        grid = np.indices((rows, cols)).sum(0) % 2
    whole = colors[grid].repeat(side, 0).repeat(side, 1)
    return whole[: pixels.shape[0], : pixels.shape[1]]


def few_levels(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Posterized, or enlarged from few pixels without interpolation."""
    if random.random() < 0.5:
        step = 255 / random.integers(1, 8)
        return (np.round(pixels / step) * step).round().astype(np.uint8)
    side = int(random.integers(2, 9))
    rows, cols = (np.arange(length) // side * side for length in pixels.shape[:2])
    return pixels[rows][:, cols]


def wrong_channels(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """A negative, or channels that are swapped or shifted against each other."""
    if random.random() < 0.3:
        return 255 - pixels
    if random.random() < 0.5:
        return np.roll(pixels, random.integers(1, 3), -1)
    return _shift_channels(pixels, int(random.integers(1, 5)))


def _shift_channels(pixels: Pixels, by: int) -> Pixels:
    return np.stack([np.roll(pixels[..., channel], by * (channel - 1), 1) for channel in range(3)], -1)


def flat(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """One color."""
    return np.broadcast_to(_two_colors(random)[0], pixels.shape)


KINDS: list[Callable[[Pixels, np.random.Generator], Pixels]] = [
    halftone, mosaic, gaussian_noise, impulse_noise, text, line_art, stripes, blocks, few_levels, wrong_channels, flat,
]
