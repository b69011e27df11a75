"""The two command lines, run as processes of their own: their time, and how much memory is theirs alone."""

import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

PAUSE = 0.01
"""Seconds between two looks at a process's memory."""


@dataclass(frozen=True)
class Cost:
    """What one run took."""

    seconds: float
    """From start to exit."""
    processor: float
    """Seconds of all cores together."""
    flush: float
    """Seconds of ``sync`` after it: what it left in the system's memory instead of on the disk."""
    peak: float
    """Bytes of anonymous memory at the most; mapped files are not in it."""


@dataclass(frozen=True)
class Contestant:
    """A command that merges a recipe into a folder."""

    name: str
    words: tuple[str, ...]
    """With {recipe} and {out}."""
    python: str
    """The interpreter it runs in."""
    environment: dict[str, str] = field(default_factory=dict)

    def merge(self, recipe: Path, out: Path, keep: bool = False) -> Cost:
        """Run it; ``out`` is removed afterwards unless it is to be kept.

        Raises:
            SystemExit: it failed.
        """
        shutil.rmtree(out, ignore_errors=True)
        cost = run([word.format(recipe=recipe, out=out) for word in self.words], self.environment)
        if not keep:
            shutil.rmtree(out)
        return cost

    def bare(self) -> float:
        """Peak anonymous bytes of its interpreter with torch imported, and nothing else."""
        return run([self.python, "-c", "import time, torch; time.sleep(0.3)"], self.environment).peak


def run(words: list[str], environment: dict[str, str]) -> Cost:
    """A command's cost; its output is shown only if it fails."""
    os.sync()
    used, start = processor(), time.perf_counter()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ) | environment
    )
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(PAUSE)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{output[-3000:]}")
    used, start = processor() - used, time.perf_counter()
    os.sync()
    return Cost(seconds, used, time.perf_counter() - start, peak)


def processor() -> float:
    """Seconds that this process's children have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def anonymous(process: int) -> float:
    """Bytes that a process alone holds: its own memory, not the files it has mapped; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def koinon(command: str, python: str, cores: int, shard: int, rounding: str = "once") -> Contestant:
    """koinon on all cores."""
    words = (*command.split(), "merge", "--from", "{recipe}", "--out", "{out}")
    options = ("--workers", str(cores), "--shard-gb", str(shard / 1e9), "--rounding", rounding)
    return Contestant("koinon", (*words, *options), python, {"OMP_NUM_THREADS": str(cores)})


def mergekit(command: str, cores: int, shard: int, asynchronous: bool = False) -> Contestant:
    """mergekit on all cores, with what makes it fast on a CPU; no tokenizer is copied and no page written."""
    words = (command, "{recipe}", "{out}", "--num-threads", str(cores), "--out-shard-size", str(shard), "--quiet",
             "--lazy-unpickle", "--no-copy-tokenizer", "--no-write-model-card", "--random-seed", "0")  # fmt: skip
    more = ("--async-write", "--write-threads", str(cores)) if asynchronous else ()
    environment = {"OMP_NUM_THREADS": str(cores), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    name = "mergekit, async" if asynchronous else "mergekit"
    return Contestant(name, (*words, *more), str(Path(command).parent / "python"), environment)


def files(folders: Iterable[Path]) -> list[Path]:
    """The tensor files in the folders."""
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def size(folders: Iterable[Path]) -> int:
    """Bytes of tensor files."""
    return sum(file.stat().st_size for file in files(folders))


def warm(folders: Iterable[Path]) -> None:
    """Have the system hold the files in its memory."""
    for file in files(folders):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass


def cold(folders: Iterable[Path]) -> None:
    """Have the system forget what it holds of the files."""
    os.sync()
    for file in files(folders):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(folders: Iterable[Path], out: Path, written: int) -> Cost:
    """Read all the files and write so many bytes of them: what no merge can do without."""
    os.sync()
    start = time.perf_counter()
    with out.open("wb", buffering=0) as target:
        for file in files(folders):
            with file.open("rb", buffering=0) as source:
                while block := source.read(1 << 22):
                    target.write(block[:written])
                    written -= min(written, len(block))
    seconds = time.perf_counter() - start
    os.sync()
    cost = Cost(seconds, 0.0, time.perf_counter() - start - seconds, 0.0)
    out.unlink()
    return cost
