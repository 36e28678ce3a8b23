"""The generating stage: edits without and with the LoRA, and the same edits with each cache beside plain sampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dittocache.data.sample import Sample
from dittocache.errors import ConfigError, ModelError
from dittocache.events import EventLog, Progress
from dittocache.families.pictures import open_picture
from dittocache.jobs.edits import PLAIN, Edit, Way, make_picture
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.placed_pipeline import load_placed
from dittocache.jobs.run_folder import CHECKPOINTS_NAME, LORA_NAME, SAMPLES_NAME
from dittocache.quality.metrics import capped, psnr
from dittocache.referencekv.isolation import isolate_references
from dittocache.sampling.generate import Picture, steps_of
from dittocache.sampling.trace import Trace
from dittocache.training.lora import WEIGHT_NAME, read_reference_visibility, read_settings

SHOWN_OF_DATA = 4  # samples of the training set that are edited where there is no held-out set
COMPARED = 3  # edits that are made in every way
REPEATS = 2  # runs of each, of which the fastest counts


def generate_edits(inputs: RunInputs, log: EventLog) -> None:
    """Make the run's pictures in `RUN/samples`.

    With `generate.prompt` or `generate.image` that one edit; else the held-out set, else some of the training set.
    Where a LoRA was trained or given, each edit is made without and with it. Where caches are configured, the first
    edits are made again with each of them, with all, and with fewer plain steps; without `generate.side_by_side`, all
    edits are made with the caches instead. Emits a `result` that lists the pictures.
    """
    edits = chosen_edits(inputs)
    lora = checked_lora(inputs)
    has_lora = lora is not None
    pipe = load_placed(inputs, log)
    ways = cached_ways(inputs)
    side_by_side = inputs.config.generate.side_by_side
    compared = edits[:COMPARED] if ways and side_by_side else []
    progress = Progress(log, len(edits) * (1 + has_lora) + REPEATS * len(compared) * (2 + len(cached_ways(inputs))))
    maker = _Maker(inputs, pipe, progress)
    maker.warm_up(edits[0])
    pictures: dict[str, dict[str, Any]] = {}
    for kind in ("base", "lora") if has_lora else ("base",):
        if kind == "lora" and lora is not None:
            use_lora(pipe, lora)
        for number, edit in enumerate(edits):
            picture = maker.make(edit, number, PLAIN if side_by_side or not ways else ways[-1])
            pictures.setdefault(edit.name, {})[kind] = maker.save(picture.image, f"{edit.name}-{kind}")
    rows = [described(edit) | pictures[edit.name] for edit in edits]
    log.emit("result", edits=rows, held_out=bool(inputs.held_out), **_gain(rows, inputs.run_dir))
    if compared:
        log.emit("result", compared=_compared(inputs, maker, compared))


def checked_lora(inputs: RunInputs) -> Path | None:
    """Folder of the LoRA that pictures are made with, if any; raises ModelError where it cannot be used."""
    given, own = inputs.config.generate.lora, inputs.run_dir / LORA_NAME
    if given is None and not own.is_dir():
        return None
    folder = given or own
    check_lora(folder, inputs.family.name)
    return folder


def check_lora(folder: Path, family_name: str) -> None:
    """Raise ModelError where the LoRA cannot be read, or was trained for another family."""
    try:
        family = read_settings(folder).get("family", family_name)
    except Exception as error:  # safetensors' own class of errors, a missing file, damaged JSON
        raise ModelError(
            f"the LoRA {folder / WEIGHT_NAME} cannot be read ({error}); train again, or put one of "
            f"{folder.parent / CHECKPOINTS_NAME} in its place"
        ) from error
    if family != family_name:
        raise ModelError(
            f"the LoRA in {folder} is of a {family}, the run's model is a {family_name}; set model.path to the model "
            "that it was trained on, or train again"
        )


def use_lora(pipe: Any, folder: Path) -> None:
    """Load the LoRA, and isolate references where it was trained with that."""
    pipe.load_lora_weights(str(folder))
    if read_reference_visibility(folder) == "isolated":
        isolate_references(pipe)


def chosen_edits(inputs: RunInputs) -> list[Edit]:
    """What to make; raises ConfigError where pictures are given without words, or words without pictures."""
    settings = inputs.config.generate
    if settings.prompt is not None or settings.image:
        if settings.prompt is None:
            raise ConfigError("generate.image is given without generate.prompt; say what to do with the picture")
        needs_image = bool(inputs.samples and inputs.samples[0].controls)
        if needs_image and not settings.image:
            raise ConfigError("generate.prompt is given without generate.image; name the picture to edit")
        as_trained = inputs.samples[0].control_resolution if inputs.samples else None
        return [Edit("edit", tuple(settings.image), settings.prompt, control_resolution=as_trained)]
    return [_edit(sample) for sample in inputs.held_out or _first_of_each(inputs.samples)]


def cached_ways(inputs: RunInputs) -> list[Way]:
    """The configured caches, each alone and then together."""
    teacache, reference_kv = inputs.config.teacache, inputs.config.reference_kv
    ways = []
    if teacache is not None:
        name, dial = "TeaCache" if teacache.is_as_published else "Step cache", teacache.in_short
        ways.append(Way(name, "cached", dial, teacache=teacache))
    if reference_kv is not None:
        refresh = reference_kv.in_short
        ways.append(Way("Reference KV", "cached", refresh, reference_kv=reference_kv))
    if teacache is not None and reference_kv is not None:
        settings = f"{dial}, {refresh}"
        ways.append(Way(f"{name} + reference KV", "cached", settings, teacache=teacache, reference_kv=reference_kv))
    return ways


def steps_of_equal_cost(steps: int, seconds: float, half_seconds: float, cached_seconds: float) -> int:
    """Plain steps that take about as long as the cached run did: the honest baseline.

    A picture costs a fixed time (encoders, decoder) and a time a step; both follow from the seconds of all `steps`
    and of half of them (`steps // 2`).
    """
    step_seconds = (seconds - half_seconds) / max(1, steps - steps // 2)
    if step_seconds <= 0:  # so few or so small steps that their time drowns in noise
        return max(1, steps // 2)
    return min(steps, max(1, round(steps - (seconds - cached_seconds) / step_seconds)))


class _Maker:
    """Makes and saves pictures with one pipeline."""

    def __init__(self, inputs: RunInputs, pipe: Any, progress: Progress) -> None:
        self._inputs = inputs
        self._pipe = pipe
        self._progress = progress
        self._folder = inputs.run_dir / SAMPLES_NAME
        self._folder.mkdir(parents=True, exist_ok=True)

    def warm_up(self, edit: Edit) -> None:
        """Two steps that nobody sees: the first call allocates and would be timed with it."""
        self._generate(edit, 0, Way("warm-up", "uncached", steps=2))

    def seconds_of(self, edit: Edit, way: Way) -> float:
        """Wall seconds of an edit that nobody sees."""
        return self._generate(edit, 0, way).seconds

    def make(self, edit: Edit, number: int, way: Way) -> Picture:
        """One edit; its noise depends on its number alone."""
        picture = self._generate(edit, number, way)
        self._progress.advance()
        return picture

    def save(self, image: Image.Image, name: str) -> str:
        """Write the picture and return its path within the run folder."""
        file = self._folder / f"{name.replace('/', '-')}.png"
        image.save(file)
        return f"{SAMPLES_NAME}/{file.name}"

    def steps(self) -> int:
        """Denoising steps of a picture, as set or usual."""
        return steps_of(self._pipe, self._inputs.config.generate)

    def _generate(self, edit: Edit, number: int, way: Way) -> Picture:
        return make_picture(self._inputs, self._pipe, edit, number, way)


def _compared(inputs: RunInputs, maker: _Maker, edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """Every edit in every way, and in as few plain steps as take about the time of the fastest cached way.

    The ways take turns, so that a machine that grows busy slows all alike; of `REPEATS` runs the fastest counts.
    """
    steps = _baseline_steps(inputs, maker, edits[0])
    fewer = Way(f"{steps} plain steps", "fewer_steps", "about the time of the fastest cache", steps=steps)
    ways = [Way("Uncached", "uncached"), *cached_ways(inputs), fewer]
    rows: list[dict[str, dict[str, Any]]] = [{} for _ in edits]
    for _ in range(REPEATS):
        for number, edit in enumerate(edits):
            for way in ways:
                variant = _variant(maker, edit, number, way)
                earlier = rows[number].get(way.label, variant)
                rows[number][way.label] = min(earlier, variant, key=lambda one: float(one["seconds"]))
    return [{**described(edit), "variants": list(row.values())} for edit, row in zip(edits, rows, strict=True)]


def _baseline_steps(inputs: RunInputs, maker: _Maker, edit: Edit) -> int:
    """Plain steps for the baseline, from one timing of each way."""
    steps = maker.steps()
    seconds, half = (
        maker.seconds_of(edit, Way("timing", "uncached", steps=count)) for count in (steps, max(1, steps // 2))
    )
    fastest = min(maker.seconds_of(edit, way) for way in cached_ways(inputs))
    return steps_of_equal_cost(steps, seconds, half, fastest)


def _variant(maker: _Maker, edit: Edit, number: int, way: Way) -> dict[str, Any]:
    picture = maker.make(edit, number, way)
    return described_picture(
        picture, way, maker.save(picture.image, f"{edit.name}-{way.label.lower().replace(' ', '-')}")
    )


def described_picture(picture: Picture, way: Way, file: str) -> dict[str, Any]:
    """A picture that was made in this way, as `result` events name it; `file` is where it lies in the run's folder."""
    return {
        "label": way.label,
        "role": way.role,
        "settings": way.settings,
        "picture": file,
        "seconds": picture.seconds,
        "patterns": _patterns(picture.trace),
        "bytes_held": picture.trace.bytes_held if way.role == "cached" else None,
        "notes": picture.trace.notes,
    }


def _patterns(trace: Trace) -> dict[str, list[str]]:
    """What each step did, by branch: `computed`, `refreshed` (references too), `kept` (kept ones used), `skipped`."""
    patterns: dict[str, list[str]] = {}
    for step in trace.steps:
        computed = {"computed": "refreshed", "reused": "kept", None: "computed"}[step.references]
        patterns.setdefault(step.branch, []).append("skipped" if step.decision == "skipped" else computed)
    return patterns


def _first_of_each(samples: Iterable[Sample]) -> list[Sample]:
    """Some samples of different targets: not one beside its mirrored twin or its other resolutions."""
    chosen: dict[Path, Sample] = {}
    for sample in samples:
        chosen.setdefault(sample.target, sample)
        if len(chosen) == SHOWN_OF_DATA:
            break
    return list(chosen.values())


def _edit(sample: Sample) -> Edit:
    """As in training; without references nothing but the sample tells the picture's ratio."""
    size = None if sample.controls else sample.size
    return Edit(sample.name, sample.controls, sample.prompt, sample.target, size, sample.control_resolution)


def described(edit: Edit) -> dict[str, Any]:
    """An edit as `result` events name it."""
    return {
        "name": edit.name,
        "caption": edit.prompt,
        "source": str(edit.images[0]) if edit.images else None,
        "target": str(edit.target) if edit.target else None,
    }


def _gain(rows: Sequence[dict[str, Any]], run_dir: Path) -> dict[str, Any]:
    """Mean PSNR to the target without and with the LoRA, where both and the targets are there."""
    if not all(row.get("lora") and row["target"] for row in rows):
        return {"words": f"{len(rows)} edits in {run_dir / SAMPLES_NAME}"}
    means = {}
    for kind in ("base", "lora"):
        values = []
        for row in rows:
            picture = open_picture(run_dir / row[kind])
            values.append(capped(psnr(picture, fitted(Path(row["target"]), picture.size))))
        means[kind] = sum(values) / len(values)
    gain = means["lora"] - means["base"]
    words = f"PSNR to target {means['base']:.1f} dB without the LoRA, {means['lora']:.1f} dB with it ({gain:+.1f} dB)"
    return {"base_psnr": means["base"], "lora_psnr": means["lora"], "words": words}


def fitted(path: Path, size: tuple[int, int]) -> Image.Image:
    """The picture, upright and RGB, at (width, height) `size`."""
    picture = open_picture(path)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
