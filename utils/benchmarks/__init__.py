"""Benchmarks: speed of coding and of training, accuracy of rate control, decoding under other floating point."""
