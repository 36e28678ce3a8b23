"""Applies the caches to a pipeline for one request, and keeps the trace of their decisions."""
