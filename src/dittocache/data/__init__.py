"""Samples from folders, captions, sizes: what a data set holds, checked before any model is loaded."""
