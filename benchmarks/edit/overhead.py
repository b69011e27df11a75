"""What it costs to filter every update: a training step with and without, of a model as large as SmolLM2-135M.

python benchmarks/edit/overhead.py [--quick]
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from koinon.nn.updates import Filtered

SAMPLE = 1_000_000
"""Entries that the threshold is estimated from."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--tokens", type=int, nargs="+", default=[32, 128], help="of each of the eight texts")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--quick", action="store_true", help="a small model, three rounds: shows that it runs")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    layers, rounds = (2, 3) if chosen.quick else (30, chosen.rounds)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ways = {
        "Adam": adam,
        "without the largest 8 %, exactly": Filtered(adam, 0.08),
        f"by a sample of {SAMPLE:,}": Filtered(adam, 0.08, sample=SAMPLE),
    }
    count = sum(its.numel() for its in model.parameters())
    title = f"{count / 1e6:,.0f} M parameters, {rounds} rounds, threads: {chosen.threads}"
    table = Table(title=title, title_justify="left")
    for column in ("tokens", "", "gradient s", "step s", "more, of a whole step"):
        table.add_column(column, justify="right" if table.columns and column else "left")
    for tokens in chosen.tokens:
        rows = measured(model, ways, rounds, tokens)
        gradient, plain = rows["Adam"]
        for name, (_, step) in rows.items():
            more = "" if name == "Adam" else f"{(step - plain) / (gradient + plain):.1%}"
            table.add_row(f"8 x {tokens}", name, f"{gradient:.2f}", f"{step:.2f}", more)
    Console(width=120).print(table)


def measured(
    model: LlamaForCausalLM, ways: dict[str, torch.optim.Optimizer], rounds: int, tokens: int
) -> dict[str, tuple[float, float]]:
    """Medians of the seconds of the gradient, of all ways alike, and of each way's step; they take turns."""
    ids = torch.randint(0, model.config.vocab_size, (8, tokens))
    gradients: list[float] = []
    steps: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first warms up
        for name, optimizer in ways.items():
            optimizer.zero_grad()
            gradient = timed(lambda: model(input_ids=ids, labels=ids).loss.backward())
            step = timed(optimizer.step)
            if number:
                gradients.append(gradient)
                steps[name].append(step)
    return {name: (median(gradients), median(its)) for name, its in steps.items()}


def timed(work: Callable[[], object]) -> float:
    """Seconds by the wall."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
