"""Why a stored tensor no longer fits: the differences between two recipes, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_ROLES = {"prompt": "caption", "target": "image", "control": "control image"}
_RESOLUTION = frozenset({"size", "area", "resolution", "condition_resolution"})
_TRANSFORMS = {"template": "prompt template", "image_backend": "image backend", "shapes": "picture shapes"}


def causes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed from one recipe of an artifact to the next; empty when nothing did.

    Words stand for the field's meaning: `caption changed`, `image changed`, `resolution changed`,
    `encoder weights changed`, `dtype changed (float32 -> bfloat16)`, `diffusers version changed (0.41 -> 0.42)`.
    """
    found: list[str] = []
    if old.get("schema") != new.get("schema"):
        found.append("recipe schema changed")
    if old.get("family") != new.get("family"):
        found.append("model family changed")
    found += _encoder_causes(old.get("encoder"), new.get("encoder"))
    found += _input_causes(old.get("inputs") or (), new.get("inputs") or ())
    found += _transform_causes(old.get("transform") or {}, new.get("transform") or {})
    found += _library_causes(old.get("libraries") or {}, new.get("libraries") or {})
    found += _storage_causes(old.get("storage") or {}, new.get("storage") or {})
    if not found and old != new:
        fields = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        found.append(f"{', '.join(fields)} changed")
    return found


def _encoder_causes(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> list[str]:
    if old is None or new is None:
        return [] if old == new else ["encoder changed"]
    if (old.get("component"), old.get("class")) != (new.get("component"), new.get("class")):
        return ["encoder changed"]
    found = [f"encoder {name} changed" for name in ("config", "weights") if old.get(name) != new.get(name)]
    if old.get("dtype") != new.get("dtype"):
        found.append(f"dtype changed ({old.get('dtype')} -> {new.get('dtype')})")
    if old.get("quantization") != new.get("quantization"):
        found.append("quantization changed")
    if old.get("batching") != new.get("batching"):
        found.append(f"batching changed ({old.get('batching', 'exact')} -> {new.get('batching', 'exact')})")
    before, after = old.get("beside") or {}, new.get("beside") or {}
    return found + [f"{name} changed" for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def _input_causes(old: Sequence[Mapping[str, str]], new: Sequence[Mapping[str, str]]) -> list[str]:
    found = []
    for role in dict.fromkeys(one["role"] for one in (*old, *new)):
        before = [one["content"] for one in old if one["role"] == role]
        after = [one["content"] for one in new if one["role"] == role]
        word = _ROLES.get(role, role)
        if len(before) != len(after):
            found.append(f"number of {word}s changed ({len(before)} -> {len(after)})")
        elif before != after:
            found.append(f"order of {word}s changed" if sorted(before) == sorted(after) else f"{word} changed")
    return found


def _transform_causes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    words = ["resolution" if name in _RESOLUTION else _TRANSFORMS.get(name, name) for name in changed]
    return [f"{word} changed" for word in dict.fromkeys(words)]


def _library_causes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    return [
        f"{name} version changed ({old.get(name)} -> {new.get(name)})"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _storage_causes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Another base record follows from another cause, which is named already; sharing rows at all is a setting."""
    found = []
    before, after = old.get("dtype", "native"), new.get("dtype", "native")
    if before != after:
        found.append(f"storage form changed ({before} -> {after})")
    if ("rows_shared_with" in old) != ("rows_shared_with" in new):
        found.append("sharing of rows with the empty prompt turned " + ("on" if "rows_shared_with" in new else "off"))
    return found
