"""Calibration: what the step cache's signal tells about a model, measured with the code that ships."""
