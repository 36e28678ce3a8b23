"""A session: caches are on for a pipeline or a transformer within a `with`, and nothing is left of them after it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from dittocache.errors import StepCacheError
from dittocache.families.denoiser import find_denoiser, installed_hook, is_isolated, remove_hook
from dittocache.families.registry import step_adapter_of
from dittocache.families.run_clock import BranchListener, DenoisingCall, RunClock, bind_forward
from dittocache.referencekv.config import ReferenceKVConfig
from dittocache.referencekv.hook import HOOK_NAME as REFERENCE_KV_HOOK
from dittocache.referencekv.hook import ReferenceKVHook, apply_reference_kv, remove_reference_kv
from dittocache.referencekv.rules import lora_visibility
from dittocache.sampling.trace import StepRecord, Trace
from dittocache.teacache.adapter import TeaCacheAdapter
from dittocache.teacache.config import TeaCacheConfig
from dittocache.teacache.hook import HOOK_NAME as TEACACHE_HOOK
from dittocache.teacache.hook import TeaCacheHook

logger = logging.getLogger(__name__)

NOT_ISOLATED = (
    "an active LoRA was trained with isolated references, but they see everything, which spoils the pictures; call "
    "dittocache.isolate_references(pipe) before"
)
HOOK_NAME = "dittocache_session"

CacheHook = TeaCacheHook | ReferenceKVHook


@contextmanager
def cached(
    target: Any, teacache: TeaCacheConfig | None = None, reference_kv: ReferenceKVConfig | None = None
) -> Iterator[Trace]:
    """Caches on `target` within the `with` block; yields the trace of their decisions.

    With both, TeaCache decides first: a skipped step touches no keys and values, and refreshes count computed steps.
    A batch is then decided on as one. State belongs to one run of one CFG branch. On exit, also by an exception, hooks
    are removed, the attention processors are the ones of before and all memory is free. Without caches the trace holds
    the times alone.

    Args:
        target: a diffusers pipeline with a transformer, or the transformer. A bare transformer returns noise tokens
            only, `(B, N, C)`, on skipped and cached steps; pipelines use no others.
        teacache: settings of the step cache; None: off.
        reference_kv: settings of the reference KV cache; None: off.

    Raises StepCacheError where caches are on for this transformer already or TeaCache does not know the model,
    ReferenceCacheError where references cannot be cached or would not be exact as asked, ModelError where there is no
    transformer.
    """
    denoiser = find_denoiser(target)
    module = denoiser.module
    if any(installed_hook(module, name) is not None for name in (HOOK_NAME, TEACACHE_HOOK, REFERENCE_KV_HOOK)):
        raise StepCacheError(
            f"caches of dittocache are on for this {type(module).__name__} already; sessions cannot be nested: give "
            "both caches to one cached(...)"
        )
    trace = Trace()
    steps = None if teacache is None else teacache.num_inference_steps

    def note(remark: str) -> None:
        trace.notes.append(remark)
        logger.warning(remark)

    clock = RunClock(step_adapter_of(module), denoiser.scheduler, steps, note)

    with ExitStack() as undo:
        caches: list[CacheHook] = []
        if reference_kv is not None:
            caches.append(apply_reference_kv(target, reference_kv, clock, note))
            undo.callback(remove_reference_kv, target)
        if lora_visibility(module) is not None and not is_isolated(module):
            note(NOT_ISOLATED)
        if teacache is not None:  # registered later, so it stands around the reference cache
            if reference_kv is not None:  # keys and values are kept for the batch as a whole
                teacache = teacache.model_copy(update={"per_sample": False})
            adapter = TeaCacheAdapter(teacache)
            caches.append(adapter.apply(target, clock, note))
            undo.callback(adapter.remove, target)
        recorder = _Recorder(trace, clock, caches)
        HookRegistry.check_if_exists_or_initialize(module).register_hook(recorder, HOOK_NAME)
        undo.callback(remove_hook, module, HOOK_NAME)
        yield trace


@contextmanager
def without_remarks() -> Iterator[None]:
    """Keep the caches' remarks out of the log, where settings are tried on purpose; traces still have them."""
    remarks = logging.getLogger("dittocache")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        yield
    finally:
        remarks.setLevel(level)


class _Recorder(ModelHook):  # type: ignore[misc]  # diffusers counts as Any
    """Outermost hook: times every call and writes down what the caches within did about it."""

    _is_stateful = True

    def __init__(self, trace: Trace, clock: RunClock, caches: list[CacheHook]) -> None:
        super().__init__()
        self.branch_listener = BranchListener()
        self._trace = trace
        self._clock = clock
        self._caches = caches
        self._drifts: list[tuple[StepRecord, torch.Tensor]] = []
        self._pending: list[tuple[StepRecord, torch.cuda.Event, torch.cuda.Event]] = []

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers (which spells it so) when the hook is removed: reads what was left on the device."""
        for record, start, end in self._pending:
            end.synchronize()
            record.seconds = start.elapsed_time(end) / 1000  # ms
        for record, drift in self._drifts:
            record.drift = float(drift)
        self._pending, self._drifts = [], []
        return module

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by diffusers at the end of a pipeline's call."""
        self._clock.end_run()
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by diffusers in place of the transformer's forward."""
        forward_kwargs = bind_forward(module, args, kwargs)
        with self._clock.call(module, self.branch_listener.heard, forward_kwargs) as call:
            record, output = self._timed(call, forward_kwargs)
            record.decision = "computed" if call.computed else "skipped"
            record.cause, record.distance, record.references = call.cause, call.distance, call.references
            record.rows, record.rows_computed = call.rows, call.rows_computed
            record.work = call.rows_computed / call.rows * (1 - call.saved) if call.computed else 0.0
            if call.drift is not None:
                self._drifts.append((record, call.drift))
            self._trace.steps.append(record)
            self._weigh()
            return output

    def _weigh(self) -> None:
        trace = self._trace
        trace.bytes_held = max(trace.bytes_held, sum(cache.bytes_held for cache in self._caches))
        for cache in self._caches:
            if isinstance(cache, ReferenceKVHook):
                trace.host_bytes_held = max(trace.host_bytes_held, cache.host_bytes_held)
                trace.reference_bytes_predicted = max(trace.reference_bytes_predicted, cache.bytes_predicted)

    def _timed(self, call: DenoisingCall, forward_kwargs: dict[str, Any]) -> tuple[StepRecord, Any]:
        record = StepRecord(call.run, call.step, call.branch, "", "", None, None, 0.0)
        forward = self.fn_ref.original_forward
        tensors = (value for value in forward_kwargs.values() if isinstance(value, torch.Tensor))
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is not None:
            # The host only queues work: the device's own clock counts, of the device that the model is on.
            stream = torch.cuda.current_stream(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record(stream)
            output = forward(**forward_kwargs)
            end.record(stream)
            self._pending.append((record, start, end))
            return record, output
        began = time.perf_counter()
        output = forward(**forward_kwargs)
        record.seconds = time.perf_counter() - began
        return record, output
