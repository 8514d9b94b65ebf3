"""What a plan says: figures with their parts, how each was found, and the command that runs the job."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NOTHING = "nothing was run"


@dataclass(frozen=True)
class FleetEstimate:
    """What the job would take on a number of GPUs that are not here."""

    gpus: str
    operations: float
    """Floating-point operations of the whole job."""
    seconds: float
    peak_tflops: float
    share: float
    """Share of the peak that was assumed."""
    memory: Mapping[str, int]
    """Bytes on one GPU, by what holds them."""
    memory_gpu: int
    advice: tuple[str, ...]
    """What makes it fit where it does not, and what else to know."""

    @property
    def fits(self) -> bool:
        """Whether one GPU holds it."""
        return sum(self.memory.values()) <= self.memory_gpu


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job will take here. All sizes are in bytes."""

    job: str
    corpus: str
    amounts: Mapping[str, float]
    """Rows, tokens, steps and the like."""
    hardware: str
    seconds: Mapping[str, float] | None
    """By part, in the order of the job; None where nothing was measured."""
    memory: int | None
    """The most that will be held; None where nothing was measured."""
    memory_here: int | None
    disk: Mapping[str, int]
    """What lies on the disk at the worst moment, by part."""
    disk_after: int
    """What remains when the job is done."""
    disk_free: int
    fleet: FleetEstimate | None = None
    memory_search: int | None = None
    """What a search of the index will hold beside files that are mapped; None where that is not told."""
    notes: tuple[str, ...] = ()
    """How the figures were found, and what is not in them."""
    next_command: str = ""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What this machine lacks for the job."""
        found = []
        if self.memory is not None and self.memory_here is not None and self.memory > self.memory_here:
            found.append(f"needs {size(self.memory)} of memory, and {size(self.memory_here)} are here")
        if self.memory_search is not None and self.memory_here is not None and self.memory_search > self.memory_here:
            found.append(f"a search needs {size(self.memory_search)} of memory, and {size(self.memory_here)} are here")
        if (needed := sum(self.disk.values())) > self.disk_free:
            found.append(f"needs {size(needed)} of disk, and {size(self.disk_free)} are free there")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Returns the figures as JSON values."""
        values = asdict(self)
        if self.seconds is not None:
            values["seconds_in_all"] = sum(self.seconds.values())
        values["disk_peak"] = sum(self.disk.values())
        if self.fleet is not None:
            values["fleet"] |= {"memory_in_all": sum(self.fleet.memory.values()), "fits": self.fleet.fits}
        return {**values, "warnings": self.warnings}

    def to_text(self) -> str:
        """Returns the figures as a table for people."""
        rows = [("job", self.job), ("corpus", self.corpus)]
        rows += [(name, _amount(name, value)) for name, value in self.amounts.items()]
        rows += [("", ""), ("hardware", self.hardware), *self._time(), *self._memory(), *self._disk()]
        if self.fleet is not None:
            rows += [("", ""), *_fleet_rows(self.fleet)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}".rstrip() for name, value in rows]
        lines += ["", *(f"warning: {warning}" for warning in self.warnings)] if self.warnings else []
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)])

    def _time(self) -> list[tuple[str, str]]:
        if self.seconds is None:
            return [("time", "not measured")]
        parts = [(f"  {name}", duration(value)) for name, value in self.seconds.items()]
        return [("time", f"{duration(sum(self.seconds.values()))} in all"), *parts]

    def _memory(self) -> list[tuple[str, str]]:
        if self.memory is None:
            return [("memory", "not measured")]
        here = f" of {size(self.memory_here)}" if self.memory_here is not None else ""
        searching = "" if self.memory_search is None else f"{size(self.memory_search)}, beside files that are mapped"
        return [("memory", f"{size(self.memory)}{here}"), *([("  of a search", searching)] if searching else [])]

    def _disk(self) -> list[tuple[str, str]]:
        peak = size(sum(self.disk.values()))
        parts = [(f"  {name}", size(value)) for name, value in self.disk.items()]
        return [("disk", f"{peak} at most, {size(self.disk_after)} when done; {size(self.disk_free)} are free"), *parts]


def _amount(name: str, value: float) -> str:
    if name == "padding":
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def _fleet_rows(fleet: FleetEstimate) -> list[tuple[str, str]]:
    needed = size(sum(fleet.memory.values()))
    verdict = "fits" if fleet.fits else "does NOT fit"
    return [
        ("fleet", f"{fleet.gpus}: about {duration(fleet.seconds)} (an estimate, nothing was run)"),
        ("  work", f"{fleet.operations:.3g} operations at {fleet.share:.0%} of {fleet.peak_tflops:g} TFLOP/s per GPU"),
        ("  memory", f"about {needed} of {size(fleet.memory_gpu)} per GPU: {verdict}"),
        *((f"    {name}", size(value)) for name, value in fleet.memory.items()),
        *(("  to do" if not number else "", advice) for number, advice in enumerate(fleet.advice)),
    ]


def duration(seconds: float) -> str:
    """Returns a time as people say it: two figures that matter."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 100:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    return f"{int(hours)} h {int(minutes % 60)} min" if hours < 72 else f"{hours / 24:.1f} days"


def size(count: float) -> str:
    """Returns a number of bytes as people say it: a GB is 10^9 bytes, as on a disk's or a GPU's label."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"
