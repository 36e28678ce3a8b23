"""Data sets that are lists of samples: CSV, JSON lines, folders with metadata, Hugging Face data sets.

`listing.read_listing` reads them, `kinds.kind_of` tells them apart.
"""
