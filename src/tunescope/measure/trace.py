"""Records training steps with torch.profiler and keeps them in two forms: columns for analysis, JSON for viewers."""

import gzip
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch.profiler import ProfilerActivity

from tunescope import latency_files as files

# Calls of the CUDA or HIP library as the profiler names them. Operators have "::" or start with a capital.
_LAUNCH = re.compile(r"(cuda|cu|hip)[A-Z]\w*")
# Copies as the profiler names them; a kernel may be called memcpy32_post.
_GPU_COPIES = {"Memcpy ": files.MEMCPY, "Memset ": files.MEMSET}
_CALL = re.compile(rf"{re.escape(files.CALL_PREFIX)}.* #(\d+)", re.DOTALL)
# What the profiler says of itself, on no thread's stack.
_OVERHEAD = {"Activity Buffer Request", "Instrumentation", "Resource", "Command Buffer Full", "Lazy Function Loading"}


_running: "list[Trace]" = []


class Trace:
    """One recording: some steps to get the profiler going, then `num_steps` recorded ones.

    Call `start()` between two steps and `step()` after each; `is_done` says when everything is recorded. Both wait for
    the GPU, so no kernel of one step is counted to another recording.
    """

    def __init__(self, *, on_gpu: bool, num_steps: int, with_memory: bool, json_file: Path | None) -> None:
        self.on_gpu = on_gpu
        self.is_done = False
        self.table: pa.Table | None = None
        self._json_file = json_file
        self._profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=self._keep,
            profile_memory=with_memory,
        )
        self._refs: Mapping[str, int] = {}

    def start(self) -> None:
        """Raises RuntimeError where somebody else's profiler runs: torch has only one, and ours would end it."""
        for left_running in list(_running):  # by a training that ended in an exception
            left_running.stop()
        if torch.autograd._profiler_enabled():
            raise RuntimeError("another profiler is running")
        self._wait()
        with warnings.catch_warnings():  # that a second cycle would forget the first: there is one
            warnings.simplefilter("ignore", UserWarning)
            self._profiler.start()
        _running.append(self)

    def step(self, parameter_modules: Mapping[str, int]) -> None:
        """parameter_modules: full name of a parameter -> id of its module, to resolve marks of gradients."""
        self._refs = parameter_modules
        self._wait()
        self._profiler.step()
        self._wait()

    def stop(self) -> None:
        """Ends a recording that training left early, without a result."""
        if self in _running:  # stopped twice, torch's profiler ends the process
            _running.remove(self)
            self._profiler.stop()

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _keep(self, profiler: Any) -> None:
        if self not in _running:
            return  # it was ended early
        _running.remove(self)
        self.table = event_table(profiler.profiler.kineto_results.events(), self._refs)
        if self._json_file is not None:
            plain = self._json_file.with_suffix("")
            profiler.export_chrome_trace(str(plain))
            # Level 1 takes 3 s for a step of Mixtral-8x7B where the default takes 20, and the file is as good.
            with plain.open("rb") as source, gzip.open(self._json_file, "wb", compresslevel=1) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            os.remove(plain)
        self.is_done = True


def event_table(events: Any, parameter_modules: Mapping[str, int]) -> pa.Table:
    """The profiler's events in the columns of latency_files.EVENTS_SCHEMA, in order of their start."""
    columns: dict[str, list[Any]] = {name: [] for name in files.EVENTS_SCHEMA.names}
    kinds: dict[tuple[str, bool, bool], tuple[str, int]] = {}
    # Where the profiler loses the operator of a launch (2 of 102,254 in Mixtral's), it says thread 1. The system's
    # number of the thread is right even then, and others on it know torch's.
    threads: dict[int, int] = {}
    launches: list[tuple[int, int]] = []
    for event in sorted(events, key=lambda e: e.start_ns()):
        name, on_device, annotated = event.name(), _is_gpu(event), event.is_user_annotation()
        known = (name, on_device, annotated)
        if known not in kinds:
            kinds[known] = _kind_and_ref(name, on_device, annotated, parameter_modules)
        kind, ref = kinds[known]
        if not kind:
            continue
        on_gpu = kind in files.GPU_KINDS
        if not on_gpu and kind != files.MEMORY:
            system_thread = event.device_resource_id()
            if kind == files.LAUNCH:
                launches.append((len(columns["kind"]), system_thread))
            else:
                threads[system_thread] = event.start_thread_id()
        columns["kind"].append(kind)
        columns["name"].append(name if kind != files.CALL else files.CALL_PREFIX)
        columns["start_ns"].append(event.start_ns())
        columns["duration_ns"].append(event.duration_ns())
        columns["thread"].append(event.device_resource_id() if on_gpu else event.start_thread_id())
        columns["device"].append(event.device_index() if on_device else -1)
        columns["correlation"].append(event.correlation_id() if on_gpu or kind == files.LAUNCH else 0)
        columns["sequence"].append(event.sequence_nr())
        columns["forward_thread"].append(event.fwd_thread_id())
        columns["ref"].append(ref)
        columns["allocated_bytes"].append(event.nbytes() if kind == files.MEMORY else 0)
    for row, system_thread in launches:
        # None on it: a thread that the profiler does not follow. It must not be taken for one that it does.
        columns["thread"][row] = threads.get(system_thread, -system_thread)
    return pa.table(columns, schema=files.EVENTS_SCHEMA)


def _is_gpu(event: Any) -> bool:
    return event.device_type() != torch.autograd.DeviceType.CPU


def _kind_and_ref(name: str, on_gpu: bool, annotated: bool, parameter_modules: Mapping[str, int]) -> tuple[str, int]:
    """What an event is, and the call or module it refers to (-1: none). Kind "" for what is left out."""
    if name == "[memory]":
        return files.MEMORY, -1
    if name in _OVERHEAD:
        return "", -1
    if on_gpu:
        if annotated:  # a range of the CPU, drawn once more on the GPU
            return "", -1
        return next((kind for start, kind in _GPU_COPIES.items() if name.startswith(start)), files.KERNEL), -1
    if call := _CALL.fullmatch(name):
        return files.CALL, int(call[1])
    if name.startswith(files.PARAMETER_PREFIX):
        return files.PARAMETER, parameter_modules.get(name.removeprefix(files.PARAMETER_PREFIX), -1)
    if name.startswith(files.MARK_PREFIX):
        return files.MARK, -1
    if name.startswith(files.NODE_PREFIX):
        return files.NODE, -1
    if annotated:
        return files.ANNOTATION, -1
    return (files.LAUNCH if _LAUNCH.fullmatch(name) else files.OP), -1
