"""Interleaved timing: every round times each provider once, so that a noisy machine hurts all alike.

CPU    perf_counter around each call; short calls are repeated within a sample, warm in cache
CUDA   events around each call, and L2 overwritten before it: device time, of which the host's share is what the
       overwriting does not hide

What a call returns (outputs, gradients, graph) is freed before the clock starts again: otherwise freeing it would be
charged to whoever comes next.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]

MOST_REPEATS = 500


@dataclass(frozen=True)
class Timing:
    """Seconds a call, one sample a round, in the order of the rounds; samples of one round belong together."""

    samples: list[float]
    repeats: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: int) -> float:
        """By linear interpolation between samples."""
        ordered = sorted(self.samples)
        place = (len(ordered) - 1) * percent / 100
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    def to_dict(self) -> dict[str, object]:
        return {
            "median_s": self.median,
            "p20_s": self.percentile(20),
            "p80_s": self.percentile(80),
            "repeats": self.repeats,
            "samples_s": self.samples,
        }


class CpuClock:
    """Wall time of calls on the host."""

    def sample(self, call: Call, repeats: int) -> float:
        """Mean seconds a call."""
        total = 0.0
        for _ in range(repeats):
            start = time.perf_counter()
            result = call()
            total += time.perf_counter() - start
            del result
        return total / repeats


class CudaClock:
    """Device time of calls that find none of their inputs in L2."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(4 * l2_bytes, 2**26), dtype=torch.uint8, device=device)

    def sample(self, call: Call, repeats: int) -> float:
        """Mean seconds a call."""
        pairs = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            result = call()
            end.record()
            del result
            pairs.append((start, end))
        torch.cuda.synchronize(self._device)
        return sum(start.elapsed_time(end) for start, end in pairs) / repeats / 1e3


def measure(
    calls: Mapping[str, Call],
    *,
    device: torch.device,
    rounds: int = 15,
    warmup: int = 2,
    sample_seconds: float = 0.02,
) -> dict[str, Timing]:
    """Time each call once a round; who begins changes from round to round.

    Args:
        calls: providers by name; what they return is freed outside the timed part.
        device: what they run on.
        rounds: samples of each provider.
        warmup: untimed calls of each provider; the first one compiles.
        sample_seconds: a sample repeats its call until it is about as long.
    """
    clock = CudaClock(device) if device.type == "cuda" else CpuClock()
    names = list(calls)
    repeats = {}
    for name in names:
        for _ in range(warmup):
            clock.sample(calls[name], 1)
        once = clock.sample(calls[name], 1)
        repeats[name] = min(max(math.ceil(sample_seconds / once), 1), MOST_REPEATS)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(clock.sample(calls[name], repeats[name]))
    return {name: Timing(samples[name], repeats[name]) for name in names}


def times_as_long(timings: Mapping[str, Timing], name: str, base: str) -> float | None:
    """Median of ``name`` over median of ``base``, or None where one of them was not measured."""
    if name not in timings or base not in timings:
        return None
    return timings[name].median / timings[base].median


def peak_memory(call: Call, device: torch.device) -> int:
    """Bytes of tensors that a call holds at its peak, besides what was held before: as the allocator counts them."""
    if device.type == "cpu":
        return _peak_memory_on_cpu(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def _peak_memory_on_cpu(call: Call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    del result
    return peak_of_profile(profile)


def peak_of_profile(profile: torch.profiler.profile) -> int:
    """Bytes that were held at the peak of a CPU profile with ``profile_memory``, besides what was held before."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def copy_bandwidth(device: torch.device, elements: int = 2**25, rounds: int = 9) -> float:
    """Bytes a second of a large fp32 copy, read and write both counted: what the shares of the tables refer to."""
    source = torch.ones(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    return 2 * source.nbytes / measure({"copy": copy}, device=device, rounds=rounds)["copy"].median
