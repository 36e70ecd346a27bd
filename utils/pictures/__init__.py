"""Pictures as arrays: finding them, reading them as 8-bit sRGB, writing PNG."""

from utils.pictures.find import find_images, find_images_or_samples, part_of_data_set, suffixes
from utils.pictures.read import ImageError, is_color, png_bytes, read_pixels, sides_of, text_of_png

__all__ = [
    "ImageError", "find_images", "find_images_or_samples", "is_color", "part_of_data_set", "png_bytes", "read_pixels",
    "sides_of", "suffixes", "text_of_png",
]
