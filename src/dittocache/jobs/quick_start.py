"""All settings of a run from a data set and a model: what a newcomer would have to look up, chosen and said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dittocache.config import BUNDLED, RunConfig, check_config, load_config
from dittocache.errors import ConfigError, DittocacheError
from dittocache.families.defaults import suggested_settings
from dittocache.jobs.demo_job import SETTINGS as DEMO_SETTINGS
from dittocache.jobs.inputs import RunInputs
from dittocache.jobs.run_folder import CONFIG_NAME
from dittocache.jobs.run_names import run_name
from dittocache.jobs.training_memory import fit_to_memory, free_machine_bytes

Notice = Callable[[str], None]
Settings = Mapping[str, Any]

STEPS_A_SAMPLE = 100  # a subject or an edit is learnt within about a hundred passes over a small set
LEAST_STEPS, MOST_STEPS = 500, 4000
GENERAL: Settings = {"train.checkpoint_every": 250, "train.keep_checkpoints": 3}
MEMORY_SETTINGS = ("gradient_checkpointing", "base_quantization", "offload")
NO_DATA_NEEDED = "; `dittocache generate` needs none with --generate.prompt"
ANY_FAMILY = "qwen-image-edit-plus"  # of the strictest sizes: what a data set is read for where the model is not known


def quick_config(
    data: str | None, model: str | None, overrides: Settings, notice: Notice, named_cache: str | None = None
) -> RunConfig:
    """The settings of the run that trains `model` on `data`; `overrides` win, and `notice` is told what was chosen.

    A run of this name that is there already goes on with its own settings. Raises ConfigError listing every problem:
    what is missing, a folder without captions, an unknown model, a misspelt setting. `named_cache` as for
    `check_config`.
    """
    problems = [
        f"{option} is missing: give {what}"
        for option, value, what in (
            ("--data", data, f"the folder of pictures and captions, or a table of them{NO_DATA_NEEDED}"),
            ("--model", model, f"the folder of a checkpoint, its id on the hub, or `{BUNDLED}`"),
        )
        if value is None
    ]
    places = {"name": run_name(data or "run"), "data.path": data or "", "model.path": model or BUNDLED}
    given: dict[str, Any] = {**places, **overrides}
    config = _checked({}, given, problems) or check_config({}, places)  # a misspelt setting hides no other problem
    if not problems and (config.run_dir / CONFIG_NAME).is_file():
        return _started(config, overrides, notice, named_cache)
    family = _family_name(config, problems) if model is not None else None
    suggested = {**GENERAL, **_suggested(model, family)}
    config = _checked(suggested, given, problems) or config
    count = _count_samples(config, family, problems) if data is not None else 0
    _require_none(list(dict.fromkeys(problems)))
    notice(f"run {config.run_dir}: {count} samples, a {family}; its settings will be in {config.run_dir / CONFIG_NAME}")
    suggested |= _chosen_steps(config, count, notice)
    suggested |= _chosen_memory(config, notice)
    return check_config({}, given, defaults=suggested, named_cache=named_cache)


def picture_config(model: str, overrides: Settings, named_cache: str | None = None) -> RunConfig:
    """The settings of a run that makes a picture of `generate.prompt` with `model`, without any data set.

    Raises ConfigError as `quick_config`.
    """
    places = {"name": "pictures", "model.path": model, "data.sets": []}
    given: dict[str, Any] = {**places, **overrides}
    problems: list[str] = []
    config = _checked({}, given, problems) or check_config({}, places)
    family = _family_name(config, problems)
    _require_none(problems)
    return check_config({}, given, defaults=_suggested(model, family), named_cache=named_cache)


def steps_for(samples: int, samples_a_step: int) -> int:
    """Optimizer steps for a set of so many samples: each is seen 100 times, within 500 and 4000 steps."""
    wanted = round(STEPS_A_SAMPLE * samples / samples_a_step / 50) * 50
    return min(max(wanted, LEAST_STEPS), MOST_STEPS)


def _checked(defaults: Settings, given: Settings, problems: list[str]) -> RunConfig | None:
    try:
        return check_config({}, given, defaults=defaults)
    except ConfigError as error:
        problems += error.problems or [str(error)]
        return None


def _require_none(problems: list[str]) -> None:
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) found before anything was loaded", problems)


def _suggested(model: str | None, family: str | None) -> dict[str, Any]:
    """Defaults for this model: the bundled one's, or its family's."""
    return _bundled() if model == BUNDLED else dict(suggested_settings(family or ""))


def _started(config: RunConfig, overrides: Settings, notice: Notice, named_cache: str | None) -> RunConfig:
    """The settings of the run that is there; raises ConfigError where it is of other data or another model."""
    file = config.run_dir / CONFIG_NAME
    found = load_config(file)
    same_data = [path.absolute() for path in found.data.paths] == [path.absolute() for path in config.data.paths]
    if not same_data or found.model.path != config.model.path:
        raise ConfigError(
            f"{config.run_dir} is a run of {found.model.path} on {', '.join(map(str, found.data.paths))}; "
            "give this one another --name"
        )
    notice(f"going on with the settings of {file}; --name NAME begins another run")
    return load_config(file, overrides, named_cache)


def _family_name(config: RunConfig, problems: list[str]) -> str | None:
    try:
        return RunInputs(config, config.run_dir).family.name
    except DittocacheError as error:
        problems.append(f"model.path: {error}")
        return None


def _count_samples(config: RunConfig, family: str | None, problems: list[str]) -> int:
    """How many samples an epoch has; what is wrong with the data set goes to `problems`."""
    model = config.model.model_copy(update={"family": family or ANY_FAMILY})
    inputs = RunInputs(config.model_copy(update={"model": model}), config.run_dir)
    try:
        return sum(sample.repeats for sample in inputs.samples)
    except DittocacheError as error:
        problems += [f"data.path: {problem}" for problem in error.problems or [str(error)]]
        return 0


def _bundled() -> dict[str, Any]:
    """How the bundled model is trained: as in the demo, but on whatever device there is."""
    sections = ("data", "train", "generate")
    settings = {f"{name}.{key}": value for name in sections for key, value in DEMO_SETTINGS[name].items()}
    del settings["train.steps"]  # which `_chosen_steps` takes from there
    return {**settings, "model.dtype": DEMO_SETTINGS["model"]["dtype"]}


def _chosen_steps(config: RunConfig, samples: int, notice: Notice) -> dict[str, int]:
    train = config.train
    if train.epochs is not None or "steps" in train.model_fields_set:
        return {}
    a_step = train.batch_size * train.gradient_accumulation_steps * train.processes
    steps = DEMO_SETTINGS["train"]["steps"] if config.model.path == BUNDLED else steps_for(samples, a_step)
    notice(
        f"{steps} steps of {a_step} sample(s), each seen about {steps * a_step / samples:.0f} times; --train.steps N"
    )
    return {"train.steps": steps}


def _chosen_memory(config: RunConfig, notice: Notice) -> dict[str, Any]:
    """How to hold the weights on a GPU whose memory is known; nothing where the user has said it, or on the CPU."""
    inputs = RunInputs(config, config.run_dir)
    said = [name for name in MEMORY_SETTINGS if name in config.train.model_fields_set]
    if said or torch.device(inputs.device).type != "cuda":
        return {}
    device_bytes, _ = torch.cuda.mem_get_info(torch.device(inputs.device))
    fit = fit_to_memory(inputs, device_bytes, free_machine_bytes())
    notice(fit.reason)
    return {f"train.{name}": fit.choice[name] for name in MEMORY_SETTINGS}
