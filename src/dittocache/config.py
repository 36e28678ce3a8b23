"""All settings of a run, as one model shared by YAML files, the command line and the Studio."""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from dittocache.config_aliases.resolving import resolve_aliases
from dittocache.config_aliases.step_cache import twice_said, with_named_cache
from dittocache.data.config import DataConfig
from dittocache.embeddings.config import CacheConfig
from dittocache.errors import ConfigError
from dittocache.quality.tuning.config import CalibrateConfig, TuneConfig
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.sampling.config import GenerateConfig
from dittocache.settings import Settings
from dittocache.teacache.config import TeaCacheConfig
from dittocache.training.config import TrainConfig

BUNDLED = "bundled"
"""Value of `model.path` that stands for the small model that comes with dittocache."""


_IN_PLAIN_WORDS: Mapping[str, str] = {
    "path_type": "a path",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a number that is not infinite",
    "string_type": "text",
    "list_type": "a list",
}
"""What pydantic's types of errors say was expected."""


class ModelConfig(Settings):
    """The checkpoint that is trained and sampled."""

    path: str = Field(min_length=1)
    """Folder of a diffusers checkpoint, its id on the Hugging Face hub, or `bundled`, the small model for trials."""

    family: str | None = None
    """Model family (`qwen-image-edit-plus`, ...); read from the checkpoint when left out."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the frozen weights; LoRA weights are always float32."""

    device: str = "auto"
    """`cuda`, `cuda:1`, `mps`, `cpu`; `auto` takes the first GPU, else the CPU."""


class RunConfig(Settings):
    """One run: what it reads, what it makes, and where it writes. Relative paths start from the working directory."""

    name: str = Field(default="run", pattern=r"^[\w][\w.\-]*$")
    """Name of the run's folder: letters, digits, `.`, `_`, `-`."""

    output_dir: Path = Path("runs")
    """Folder that holds the folders of runs."""

    held_out: Path | None = None
    """Data set like `data.path` that is never trained on; edited before and after training to show what was learnt."""

    model: ModelConfig
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    teacache: TeaCacheConfig | None = None
    reference_kv: ReferenceKVConfig | None = None
    calibrate: CalibrateConfig = CalibrateConfig()
    tune: TuneConfig = TuneConfig()

    @property
    def run_dir(self) -> Path:
        """The run's own folder."""
        return self.output_dir / self.name


def load_config(path: Path, overrides: Mapping[str, Any] | None = None, named_cache: str | None = None) -> RunConfig:
    """Read a YAML or TOML file, apply `overrides` (`{"train.steps": 20}`) on top, check everything; as `check_config`.

    Raises ConfigError that lists every problem: the setting's dotted name, what was found, what is expected.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, Loader=_StrictLoader)
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no config file {path}; give the path of a YAML or TOML file with --config"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except tomllib.TOMLDecodeError as error:  # its message ends in the line and column
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected `section: settings` entries")
    return check_config(content, overrides, origin=str(path), named_cache=named_cache)


def check_config(
    content: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    origin: str = "",
    defaults: Mapping[str, Any] | None = None,
    named_cache: str | None = None,
) -> RunConfig:
    """The `RunConfig` of nested settings; raises ConfigError that lists every problem.

    Args:
        overrides: settings by dotted name that win over `content`.
        origin: of `content`, for the error.
        defaults: settings by dotted name that are taken where neither of the two says anything.
        named_cache: the `cache_adapter` of the environment, for where neither of the two names a step cache.
    """
    overrides = with_named_cache(content, overrides or {}, named_cache)
    problems = [*twice_said(content), *twice_said(overrides)]
    settings = resolve_aliases(content, problems)
    for name, value in overrides.items():
        _put(settings, name, value, problems)
    settings = resolve_aliases(settings, problems)  # an override may use the spec's spelling too
    for name, value in (defaults or {}).items():
        if not _has(settings, name):
            _put(settings, name, value, problems)
    try:
        config = RunConfig.model_validate(settings)
    except ValidationError as error:
        problems += [_problem(details) for details in error.errors(include_url=False)]
        config = None
    if config is None or problems:
        where = f" in {origin}" if origin else ""
        raise ConfigError(f"{len(problems)} problem(s) with the settings{where}", problems)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write every setting, defaults included, so that the run can be repeated; `load_config` reads it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)


def parse_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """Settings from command line words: `--train.steps 20` or `--train.steps=20`.

    Lists and mappings are YAML (`--generate.image '[a.png, b.png]'`), `null` takes a setting or section away; all
    else is left as text, which the setting's own type reads. Raises ConfigError that lists every word out of place.
    """
    overrides: dict[str, Any] = {}
    problems: list[str] = []
    words = list(tokens)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            problems.append(f"{word!r} is out of place; settings are written --section.setting value")
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            if not words or (words[0].startswith("--") and len(words[0]) > 2):
                problems.append(f"{word} has no value; write {word} VALUE")
                continue
            text = words.pop(0)
        overrides[name] = _override_value(name, text, problems)
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) on the command line", problems)
    return overrides


def setting_fields(model: type[Settings] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and pydantic field of every setting, sections left out."""
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            yield prefix + name, field
        else:
            yield from setting_fields(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[Settings] | None:
    """The settings model of a field that is a section, optional or not."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((kind for kind in options if isinstance(kind, type) and issubclass(kind, Settings)), None)


def _put(settings: dict[str, Any], name: str, value: Any, problems: list[str]) -> None:
    """Set one dotted name in nested settings."""
    *sections, last = name.split(".")
    level = settings
    for depth, section in enumerate(sections, start=1):
        inner = level.get(section)
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            problems.append(f"{name}: {'.'.join(sections[:depth])} is {inner!r}, which holds no settings")
            return
        level[section] = inner = dict(inner)
        level = inner
    level[last] = value


def _has(settings: Mapping[str, Any], name: str) -> bool:
    """Whether nested settings have an entry of this dotted name."""
    level: Any = settings
    for part in name.split("."):
        if not isinstance(level, Mapping) or part not in level:
            return False
        level = level[part]
    return True


def _override_value(name: str, text: str, problems: list[str]) -> Any:
    if text.strip().lower() in ("null", "none"):
        return None
    if text[:1] not in ("[", "{"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problems.append(f"--{name}: {text!r} is not a YAML list or mapping ({str(error).splitlines()[0]})")
        return None


def _problem(details: ErrorDetails) -> str:
    """One line about one setting: its dotted name, what was found, what is expected."""
    name = ".".join(str(part) for part in details["loc"])
    if details["type"] == "extra_forbidden":
        return f"{name}: there is no such setting{_suggestion(name)}"
    if details["type"] == "missing":
        return f"{name} is missing{_what_it_is(name)}"
    if details["type"] == "value_error" and isinstance(details["input"], Mapping):  # settings that do not go together
        return f"{name}: {details['msg'].removeprefix('Value error, ')}"
    return f"{name}: found {details['input']!r}; expected {_expectation(name, details)}"


def _expectation(name: str, details: ErrorDetails) -> str:
    """What pydantic wanted, in plain words."""
    if details["type"] == "string_pattern_mismatch":
        return _descriptions().get(name, "other characters")
    if details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "a section with settings of its own"
    if details["type"] in _IN_PLAIN_WORDS:
        return _IN_PLAIN_WORDS[details["type"]]
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return message[:1].lower() + message[1:]


def _suggestion(name: str) -> str:
    """The setting that was probably meant: spelt alike, or of the same name in another section.

    In its own section a name that ends so is nearer: `generate.steps` means `generate.num_inference_steps`.
    """
    known = [setting for setting, _ in setting_fields()]
    known += sorted({setting.rpartition(".")[0] for setting in known if "." in setting})
    section, _, last = name.rpartition(".")
    ending = [setting for setting in known if setting.startswith(f"{section}.") and setting.endswith(f"_{last}")]
    if len(ending) == 1:
        return f"; did you mean {ending[0]}?"
    near = [setting for setting in known if setting.rpartition(".")[2] == last]
    near += difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if not near:
        by_last = {setting.rpartition(".")[2]: setting for setting in known}
        near = [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)]
    return f"; did you mean {near[0]}?" if near else ""


def _what_it_is(name: str) -> str:
    """What a missing setting or section is for."""
    described = _descriptions()
    if name in described:
        return f": {described[name]}"
    inside = [setting for setting, field in setting_fields() if setting.startswith(f"{name}.") and field.is_required()]
    return f"; it needs {', '.join(inside)}" if inside else ""


def _descriptions() -> dict[str, str]:
    return {setting: field.description or "" for setting, field in setting_fields()}


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error: the first value would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)
