"""What both sides are asked to do: one file of settings, read by a process of each. Needs nothing but Python.

A side runs as ``python ours.py JOB`` or ``python theirs.py JOB`` and tells when it is where, a line of JSON each.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """Facts to be taught to a model."""

    method: str
    """rome, memit, grace or wise."""
    model: str
    """A folder."""
    facts: list[dict[str, str]]
    """Prompt (with {} for the subject), subject, object."""
    layers: list[int]
    """Numbers of blocks, rising."""
    steps: int
    """Of descent for each fact."""
    separately: bool = False
    """Teach each fact to the model as it was, and keep what it changed; otherwise one on top of the other."""
    whiten: bool = True
    """Use the second moment of keys."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other hyper-parameters, by koinon's names; see `theirs.py` for EasyEdit's."""
    unrelated: list[str] = field(default_factory=list)
    """Prompts for WISE's routing loss."""
    corpus: list[str] = field(default_factory=list)
    """Texts for second moments."""
    before: list[str] = field(default_factory=list)
    """What both put before prompts, the empty beginning first; what each writes itself is only timed."""
    moments: str = ""
    """A file with C of each layer: koinon writes it, EasyEdit reads it."""
    kept: str = ""
    """The file that the changes are written to."""
    repository: str = ""
    """Of EasyEdit."""
    threads: int = 1

    def write(self, file: Path) -> Path:
        """Into a file."""
        file.write_text(json.dumps(asdict(self)))
        return file

    @classmethod
    def read(cls, file: str) -> "Job":
        """From a file."""
        return cls(**json.loads(Path(file).read_text()))


class Teller:
    """Lines on what was standard output; what libraries print meanwhile goes nowhere."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        self.last = clock()

    def tell(self, what: str, **more: object) -> None:
        """What was just finished, and what it took since the last time."""
        now = clock()
        used = {name: after - before for (name, after), before in zip(now.items(), self.last.values(), strict=True)}
        print(json.dumps({"done": what, **used, "anonymous": anonymous(), **more}), file=self.out)
        self.last = clock()


def clock() -> dict[str, float]:
    """Seconds by the wall, and seconds that this process has computed."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"wall": time.perf_counter(), "processor": used.ru_utime + used.ru_stime}


def anonymous(process: int | str = "self") -> float:
    """Bytes that a process alone holds: its own memory, not the files it has mapped; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(1024.0 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """How many times a model's head is asked: once in each forward pass, whole or of the upper blocks alone."""
    calls: list[int] = []
    head = model.get_output_embeddings()
    plain = head.forward

    def forward(*given: Any, **named: Any) -> Any:  # a hook would be given, and so ask for, all that the head can say
        calls.append(1)
        return plain(*given, **named)

    head.forward = forward
    try:
        yield calls
    finally:
        del head.forward


def job() -> Job:
    """The one that this process was started for."""
    return Job.read(sys.argv[1])
