"""Tuning: the fastest setting that keeps a promise on pictures that nobody has seen yet."""
