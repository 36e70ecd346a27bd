"""Symbols to streams and back: coders of slices, tables, table rows that other machines select too, arithmetic."""
