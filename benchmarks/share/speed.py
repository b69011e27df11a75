"""Training speed and memory of koinon's trunks beside torch-rechub's and deepctr-torch's: equal outputs first.

python benchmarks/share/speed.py [--quick]
"""

import argparse
import copy
import gc
import platform
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

import torch
from contestants import CONTESTANTS, SETTINGS, Contestant, build, draw
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from koinon.nn.experts import Gates

BATCH = 4096
TOLERANCE = 1e-4
WARMUPS = 5
COLUMNS = ("", "fwd+bwd ms", "step ms", "samples/s", "/ koinon, fwd+bwd", "/ koinon, step", "GFLOP", "floor", "MB")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="batch 512 and 5 rounds: shows that it runs, no more")
    arguments.add_argument("--rounds", type=int, default=20, help="timed rounds")
    arguments.add_argument("--memory", nargs=3, metavar=("CONTESTANT", "METHOD", "SETTING"), help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    batch, rounds = (512, 5) if chosen.quick else (BATCH, chosen.rounds)
    if chosen.memory:
        name, method, setting = chosen.memory
        print(peak(name, method, setting, batch))
        return
    console = Console(width=120)
    rate = gemm_rate(batch)
    console.print(machine(batch), f"One large matrix product runs at {rate / 1e9:.0f} GFLOP/s.", sep="\n")
    for setting in SETTINGS:
        for method, names in CONTESTANTS.items():
            if len(names) > 1 or setting == "trunk":  # where nothing is compared, one setting is enough
                console.print(measure(method, setting, batch, rounds, rate, console))


def measure(method: str, setting: str, batch: int, rounds: int, rate: float, console: Console) -> Table:
    rows = draw(SETTINGS[setting], batch)
    contestants = {name: build(name, method, SETTINGS[setting], rows) for name in CONTESTANTS[method]}
    for thread in threading.enumerate():  # deepctr-torch asks PyPI for its newest version in one
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    for name, theirs in contestants.items():
        if theirs.same is not None:
            console.print(
                f"{method}, {setting}: {name} against {theirs.same}: {compare(contestants[theirs.same], theirs)}"
            )
    times = race(list(contestants.values()), rounds)
    table = Table(title=f"{method}, {setting}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for name, contestant in contestants.items():
        passes, steps = times[name]
        ours = times.get(contestant.same or "")
        flops = products(contestant)
        table.add_row(
            name,
            f"{median(passes) * 1e3:.0f}",
            f"{median(steps) * 1e3:.0f}",
            f"{batch / median(steps):,.0f}",
            ratio(passes, ours[0]) if ours else "",
            ratio(steps, ours[1]) if ours else "",
            f"{flops / 1e9:.1f}",
            f"{flops / rate / median(passes):.0%}",
            f"{memory(name, method, setting, batch == BATCH):,.0f}",
        )
    return table


def compare(ours: Contestant, theirs: Contestant) -> str:
    """Largest difference of probabilities: as built, and, where equal in training, after a step of gradient descent.

    Raises:
        SystemExit: it is above the tolerance.
    """
    differences = {"outputs": difference(ours, theirs)}
    if theirs.exact:
        before = ours.forward().detach()
        kept = [copy.deepcopy(side.model.state_dict()) for side in (ours, theirs)]
        for side in (ours, theirs):
            descend(side, gate_bias=theirs.gate_bias)
        moved = (ours.forward() - before).abs().max().item()
        differences[f"after a step that moves them by {moved:.2g}"] = difference(ours, theirs)
        for side, state in zip((ours, theirs), kept, strict=True):
            side.model.load_state_dict(state)
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"{theirs.name} does not compute what {ours.name} does: {differences}")
    return ", ".join(f"{what} {value:.1e}" for what, value in differences.items())


@torch.no_grad()
def difference(ours: Contestant, theirs: Contestant) -> float:
    for side in (ours, theirs):
        side.model.eval()
    value = (ours.forward() - theirs.forward()).abs().max().item()
    for side in (ours, theirs):
        side.model.train()
    return value


def descend(side: Contestant, gate_bias: bool, rate: float = 0.1) -> None:
    gates = [module.bias for module in side.model.modules() if isinstance(module, Gates)]
    for bias in gates:
        bias.requires_grad_(gate_bias)
    side.loss().backward()
    with torch.no_grad():
        for parameter in side.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad)
    for bias in gates:
        bias.requires_grad_(True)
    side.model.zero_grad()


def race(contestants: list[Contestant], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of forward and backward pass, and of the whole step with Adam, one of each contestant in turn."""
    optimizers = [contestant.optimizer() for contestant in contestants]
    times: dict[str, tuple[list[float], list[float]]] = {contestant.name: ([], []) for contestant in contestants}
    gc.collect()
    gc.disable()
    for turn in range(WARMUPS + rounds):
        for contestant, optimizer in zip(contestants, optimizers, strict=True):
            start = time.perf_counter()
            optimizer.zero_grad()
            contestant.loss().backward()
            passed = time.perf_counter() - start
            optimizer.step()
            stepped = time.perf_counter() - start
            if turn >= WARMUPS:
                times[contestant.name][0].append(passed)
                times[contestant.name][1].append(stepped)
    gc.enable()
    return times


def ratio(theirs: list[float], ours: list[float]) -> str:
    ratios = [them / us for them, us in zip(theirs, ours, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def products(contestant: Contestant) -> int:
    """Floating point operations in the matrix products of a forward and a backward pass."""
    # torch leaves out products that are added in place.
    counted = {torch.ops.aten.addmm_: lambda _y, x, weight, **_: 2 * x[0] * x[1] * weight[1]}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        contestant.loss().backward()
    contestant.model.zero_grad()
    return counter.get_total_flops()


def gemm_rate(batch: int) -> float:
    """Floating point operations a second of one large product, [batch, 700] by [700, 512]."""
    x, weight = torch.randn(batch, 700), torch.randn(512, 700)
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        F.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * batch * 700 * 512 / min(seconds)


def memory(name: str, method: str, setting: str, full: bool) -> float:
    command = [sys.executable, str(Path(__file__)), "--memory", name, method, setting, *([] if full else ["--quick"])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def peak(name: str, method: str, setting: str, batch: int) -> float:
    """Peak resident MB of three training steps, above what is resident after the imports."""
    build(name, method, SETTINGS[setting], draw(SETTINGS[setting], 8)).loss().backward()  # imports, thread pools
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    contestant = build(name, method, SETTINGS[setting], draw(SETTINGS[setting], batch))
    optimizer = contestant.optimizer()
    for _ in range(3):
        optimizer.zero_grad()
        contestant.loss().backward()
        optimizer.step()
    return (status("VmHWM") - before) / 1000


def status(field: str) -> int:
    """A field of this process's status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def machine(batch: int) -> str:
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    packages = ("koinon", "torch-rechub", "deepctr-torch", "torch")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{versions}, Python {platform.python_version()}, {cpus[0]}, {torch.get_num_threads()} thread, batch {batch}"


if __name__ == "__main__":
    main()
