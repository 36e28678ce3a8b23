"""What the stages found, in a few words each: for the terminal and the Studio."""

from __future__ import annotations

from dittocache.events import Event, number_in


def describe_result(event: Event) -> list[str]:
    """What a `result` event says, in a few words each; empty for details that nobody need see at a glance."""
    words = []
    encoded, reused = number_in(event, "encoded"), number_in(event, "reused")
    if encoded is not None and reused is not None:
        words.append(f"{encoded} encoded, {reused} reused")
        if written := number_in(event, "bytes_written"):
            words.append(f"{written / 1e6:.1f} MB written")
        failed = event.get("failed")
        if isinstance(failed, dict) and failed:
            words.append(f"{len(failed)} pictures left out")
    samples, held_out = number_in(event, "samples"), number_in(event, "held_out")
    if samples is not None and held_out is not None:
        words.append(f"{samples} samples, {held_out} held out")
    steps, seconds_per_step = number_in(event, "steps"), number_in(event, "seconds_per_step")
    if seconds_per_step and steps is not None:
        words.append(f"{steps} steps, {seconds_per_step:.3f} s each")
    if "words" in event:
        words.append(str(event["words"]))
    return words
