"""Symbols to streams and back: coders of slices, tables, table indexes that other machines select too, arithmetic."""
