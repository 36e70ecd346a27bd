"""Measurements: rate and distortion of a codec, tables and JSON of them, BD-rate, classical codecs, the R-λ study."""
