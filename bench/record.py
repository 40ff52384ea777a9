"""What a run leaves: rows of figures and a block on where they were taken, as one small JSON file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
FILE = "results.json"


@dataclass(frozen=True)
class Row:
    """One measured case.

    Attributes:
        op, label, dtype, size, variant: as in `bench.cases.Case`; `kind` is the size's.
        elements: of a tensor of the full shape.
        direction, point, form: the job.
        path: which code ran.
        bytes: the fewest that the job must move.
        seconds: the time of one call, in the round that the run's "statistic" names.
        q1, median, q3: quartiles over the rounds.
        rounds, calls, sets: batches timed, calls in a batch, sets of inputs they rotate through.
        host_limited: the host may have been slower than the device.
    """

    op: str
    label: str
    dtype: str
    size: str
    kind: str
    elements: int
    direction: str
    point: str | None
    form: str
    variant: str
    path: str
    bytes: int
    seconds: float
    q1: float
    median: float
    q3: float
    rounds: int
    calls: int
    sets: int
    host_limited: bool = False


@dataclass(frozen=True)
class Forecast:
    """What the roofline model predicts for a job of the kernels: never measured."""

    op: str
    dtype: str
    elements: int
    direction: str
    point: str | None
    form: str
    gpu: str
    bytes: int
    seconds: float
    bound: str


@dataclass
class Run:
    """One run of the benchmarks on one device."""

    metadata: dict[str, Any]
    rows: list[Row]
    forecasts: list[Forecast] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As the file holds it."""
        rows, forecasts = ([asdict(item) for item in items] for items in (self.rows, self.forecasts))
        return {"metadata": self.metadata, "rows": rows, "forecasts": forecasts}

    def save(self, folder: Path) -> None:
        """Write it as `results.json`, a row a line."""
        folder.mkdir(parents=True, exist_ok=True)
        metadata, *lists = self.as_dict().items()
        parts = [f'"metadata": {json.dumps(metadata[1], indent=1)}']
        for name, items in lists:
            lines = ",\n".join(map(json.dumps, items))
            parts.append(f'"{name}": [\n{lines}\n]')
        (folder / FILE).write_text("{\n" + ",\n".join(parts) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what `save` wrote, from the file or its folder.

        Raises:
            FileNotFoundError: there is none.
        """
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; make one with: python -m bench.run")
        data = json.loads(path.read_text())
        rows = [Row(**row) for row in data["rows"]]
        return cls(data["metadata"], rows, [Forecast(**f) for f in data["forecasts"]])


def rows(benchmarks: Iterable[dict[str, Any]]) -> list[Row]:
    """The rows of pytest-benchmark's own records, whose `extra_info` says what each one timed."""
    kept = {"seconds": "median" if statistic() == "median" else "min", "q1": "q1", "median": "median", "q3": "q3"}
    found = []
    for record in benchmarks:
        if "calls" not in record["extra_info"]:  # an interrupt came while it was measured
            continue
        stats = record["stats"]
        times: dict[str, Any] = {name: float(f"{stats[key]:.4g}") for name, key in kept.items()}
        found.append(Row(**record["extra_info"], **times, rounds=stats["rounds"]))
    return found


def statistic() -> str:
    """Which round stands for a case: "median", or "fastest" on a CPU, where other work only ever adds time."""
    return "median" if torch.cuda.is_available() else "fastest"


def metadata(note: str = "") -> dict[str, Any]:
    """Where and when, and on which versions."""
    versions = {"torch": torch.__version__, "triton": _version("triton"), "python": platform.python_version()}
    return {
        "device": device_name(),
        "slug": slug(),
        "statistic": statistic(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "versions": {**versions, "retainops": _version("retainops"), "cuda": torch.version.cuda, "driver": _driver()},
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "note": note,
    }


def device_name() -> str:
    """The device measured, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    model = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU {model[1] if model else platform.machine()}, {cores} cores"


def slug() -> str:
    """The device's name as a folder's: "nvidia-h200", "cpu-amd-epyc-2-cores"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def cache_bytes() -> int:
    """The size of the device's last-level cache."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).L2_cache_size
    found = re.match(r"(\d+)K", _read("/sys/devices/system/cpu/cpu0/cache/index3/size"))
    return int(found[1]) * 1024 if found else 32 * 2**20


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def _commit() -> str | None:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = commit and _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + (" with changes" if changed else "")


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
