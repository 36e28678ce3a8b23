"""The bundled model does what it was trained for, on scenes and instructions that it never saw."""

import pytest

from dittocache.demo.edits import EXACT_KINDS, evaluation_edits
from dittocache.demo.evaluate import carried_out, rest_kept, run_edits, summarise
from dittocache.demo.model import load_pipeline
from dittocache.quality.metrics import psnr

# Bounds for ten edits, two of each kind; the figures for all 64 are in the training log's evaluation.json.
LEAST_SHARE = 0.8
LEAST_PSNR_DB = 28.0


@pytest.fixture(scope="module")
def report():
    outcomes, pictures = run_edits(load_pipeline(), evaluation_edits(10))
    return summarise(outcomes), pictures


def test_held_out_edits_are_carried_out(report):
    figures, _ = report
    assert set(figures["kinds"]) == set(EXACT_KINDS)
    assert figures["share_carried_out"] >= LEAST_SHARE
    assert figures["mean_psnr_db"] >= LEAST_PSNR_DB


def test_the_measure_tells_source_and_target_apart(report):
    _, pictures = report
    for source, _, target in pictures:
        assert carried_out(target, source, target)
        assert not carried_out(source, source, target)
        assert rest_kept(target, source, target)
        assert psnr(source, target) < psnr(target, target) == float("inf")
