"""Settings of the specification's configs that say what happens here anyway, and those that cannot be had.

Each rule looks at the value: what it says must be true here, else the user is told what to write instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dittocache.config_aliases.names import FAMILIES
from dittocache.config_aliases.nested import put, taken
from dittocache.config_aliases.pictures import apply_loss, apply_sizes
from dittocache.config_aliases.step_cache import apply_step_cache

_NOTHING = object()
_NONE_OF_IT: tuple[Any, ...] = (None, False, 0, 0.0, "")

# Setting -> values that say what happens anyway, and what to do with any other.
ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "resume": ((None,), "a run goes on by itself when the same command is given again; leave it out"),
    "mode": (("fit",), "the command says it: dittocache cache, train or generate; leave it out"),
    "model.full_finetune": ((False, None), "only LoRAs are trained; leave it out"),
    "model.pretrained_embeddings": ((None,), "all encoders come from the checkpoint at model.path; leave it out"),
    "model.use_vlm_prompt_enhancer": ((False, None), "prompts are taken as they are; leave it out"),
    "model.distilled_guidance_scale": ((None,), "training tells a distilled model no guidance; leave it out"),
    "model.lora.pretrained_weight": ((None,), "a LoRA begins anew, and a run goes on by itself; leave it out"),
    "data.shuffle": ((True, None), "every epoch is shuffled, in an order that train.seed decides; leave it out"),
    "data.init_args.prompt_image_dropout_rate": (
        _NONE_OF_IT,
        "the pictures of a prompt are never dropped; write 0, and data.caption_dropout for the words",
    ),
    "data.init_args.cache_drop_rate": (_NONE_OF_IT, "write data.caption_dropout, which holds with a cache too"),
    "data.init_args.use_edit_mask": (
        (True, None),
        "a mask x_mask.png beside a picture always weighs the loss; remove the masks, and leave this out",
    ),
    "data.init_args.selected_control_indexes": (
        (None,),
        "all control pictures of a sample are used; leave the others out of the data set",
    ),
    "data.init_args.random_crop": ((False, None), "a cached picture has one size; write data.buckets: false to crop"),
    "logging.logging_dir": (("logs", None), "logs are in the run's own folder, in logs/; leave it out"),
    "logging.tags": ((None, []), "runs have no tags; leave it out"),
    "logging.notes": ((None, ""), "runs have no notes; leave it out"),
    "train.low_memory": (
        (True, False, None),
        "true or false: encoders are not in memory while a cached training runs in either case",
    ),
    "train.resume_from_checkpoint": ((None,), "a run goes on by itself when the same command is given again"),
    "validation.seed": ((42, None), "validation pictures have the noise of generate.seed; leave it out"),
    "validation.dataset": ((None,), "write held_out: FOLDER, a data set that is never trained on"),
    "validation.samples": ((None,), "write held_out: FOLDER, or train.validation_prompts: [...]"),
    "data.init_args.processor.init_args.max_aspect_ratio": (
        (None, 3.0),
        "pictures of any ratio are taken; leave it out",
    ),
    "data.init_args.processor.init_args.resize_controls_mask_to_image": (
        (False, None),
        "control pictures keep their ratio; leave it out",
    ),
    "data.init_args.processor.init_args.resize_mode": (
        (None, "lanczos"),
        "pictures are resized as the model's own pipeline does it (Lanczos); leave it out",
    ),
    "data.init_args.processor.init_args.multi_resolutions": (
        (None,),
        "write data.resolution: [768, 1024] to train each sample at each",
    ),
}

# Names of classes that are what happens anyway, by how they end.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "data.class_path": ("ImageDataset", "torch.utils.data.Dataset"),
    "data.init_args.processor.class_path": ("ImageProcessor",),
}

LIVE_DEVICES: Mapping[str, str] = {
    "train.vae_encoder_device": "vae",
    "train.text_encoder_device": "text_encoder",
    "train.fit_device.vae": "vae",
    "train.fit_device.vae_encoder": "vae",
    "train.fit_device.text_encoder": "text_encoder",
    "train.fit_device.text_encoder_2": "text_encoder_2",
}

# The embeddings that caption dropout replaces: of Qwen-Image, and of FLUX.
EMPTY_PROMPTS = (
    frozenset({"empty_prompt_embeds", "empty_prompt_embeds_mask"}),
    frozenset({"empty_prompt_embeds", "empty_pooled_prompt_embeds"}),
)


def apply_rules(settings: dict[str, Any], problems: list[str]) -> None:
    """Take every setting of the specification that has a rule out of `settings`, and set what it stands for."""
    if taken(settings, "validation.enabled", True) is False:
        del settings["validation"]
    for name, (accepted, instead) in ONLY.items():
        value = taken(settings, name, _NOTHING)
        if value is not _NOTHING and not any(value == one and type(value) is type(one) for one in accepted):
            problems.append(f"{name}: found {value!r}; {instead}")
    for name, endings in CLASSES.items():
        value = taken(settings, name, None)
        if value is not None and not str(value).endswith(endings):
            problems.append(f"{name}: found {value!r}; other classes cannot be loaded: leave it out")
    taken(settings, "model.lora.adapter_name", None)  # a saved LoRA bears no name
    for rule in (
        _trainer,
        _quantize,
        _data_set,
        _drop_keys,
        _live_devices,
        _predict_devices,
        _image_kv_cache,
        apply_loss,
        apply_step_cache,
    ):
        rule(settings, problems)
    apply_sizes(settings, problems)


def _image_kv_cache(settings: dict[str, Any], problems: list[str]) -> None:
    """The specification's switch is a section here, whose settings all have defaults."""
    name = "generate.use_image_kv_cache"
    wanted = taken(settings, name, None)
    if wanted is None:
        return
    if str(wanted).lower() not in ("true", "false"):
        problems.append(f"{name}: found {wanted!r}; expected true or false")
    elif str(wanted).lower() == "true":
        if settings.get("reference_kv") is None:
            settings["reference_kv"] = {}
    elif settings.get("reference_kv") is not None:
        problems.append(f"{name} is {wanted!r}, but reference_kv has settings; they mean the same: keep one")


def _trainer(settings: dict[str, Any], problems: list[str]) -> None:
    for name in ("trainer", "train.trainer"):
        kind = taken(settings, name, None)
        if kind in FAMILIES:
            put(settings, "model.family", FAMILIES[kind], name, problems)
        elif kind is not None:
            problems.append(
                f"{name}: found {kind!r}; expected {', '.join(FAMILIES)}, or model.family with its name here"
            )


def _quantize(settings: dict[str, Any], problems: list[str]) -> None:
    quantize = taken(settings, "model.quantize", None)
    if quantize is True:
        put(settings, "train.base_quantization", "fp8", "model.quantize", problems)
    elif quantize not in (None, False):
        problems.append(f"model.quantize: found {quantize!r}; expected true (fp8) or false")


def _data_set(settings: dict[str, Any], problems: list[str]) -> None:
    name = "data.init_args.dataset_path"
    paths = taken(settings, name, None)
    if paths is None:
        return
    several = paths if isinstance(paths, list) else [paths]
    if not all(isinstance(path, str) for path in several):
        problems.append(
            f"{name}: data sets of the hub are not downloaded while training; write the folder that "
            "`hf download --repo-type dataset ID` makes"
        )
    elif len(several) == 1:
        put(settings, "data.path", several[0], name, problems)
    else:
        put(settings, "data.sets", [{"path": path} for path in several], name, problems)


def _drop_keys(settings: dict[str, Any], problems: list[str]) -> None:
    for name in ("cache.prompt_empty_drop_keys", "data.init_args.prompt_empty_drop_keys"):
        keys = taken(settings, name, None)
        if keys is None:
            continue
        expected = " or ".join(", ".join(sorted(pair, key=lambda key: (len(key), key))) for pair in EMPTY_PROMPTS)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            problems.append(f"{name}: found {keys!r}; expected a list of {expected}")
        elif frozenset(keys) not in EMPTY_PROMPTS:
            problems.append(f"{name}: found {', '.join(keys)}; expected {expected}: they are replaced together")


def _live_devices(settings: dict[str, Any], problems: list[str]) -> None:
    """Devices of the encoders while training: they are loaded in live training only, and run on `cache.devices`."""
    cache = settings.get("cache")
    live = isinstance(cache, dict) and cache.get("use_cache") is False
    for name, encoder in LIVE_DEVICES.items():
        device = taken(settings, name, None)
        if live and device is not None:
            put(settings, f"cache.devices.{encoder}", device, name, problems)


def _predict_devices(settings: dict[str, Any], problems: list[str]) -> None:
    """Pictures are made by one pipeline on the device of the training."""
    devices = taken(settings, "predict.devices", None)
    if not isinstance(devices, dict):
        return
    model = settings.get("model")
    ours = model.get("device", "auto") if isinstance(model, dict) else "auto"
    same = {ours, "cuda", "cuda:0"} if ours in ("auto", "cuda", "cuda:0") else {ours}
    if not {device for device in devices.values() if device is not None} <= same:
        problems.append(
            f"predict.devices: found {devices}; pictures are made on model.device, which is {ours}: set that, or "
            "CUDA_VISIBLE_DEVICES, and leave this out"
        )
