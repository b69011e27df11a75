"""How much of a comparison's time is its own: starting processes, sending data, keeping cells, writing the report.

python benchmarks/share/overhead.py
"""

import json
import tempfile
import time
from pathlib import Path

from koinon.bench.compare import compare
from koinon.bench.report import Report
from koinon.recipes.share import ShareRecipe


def main() -> None:
    """Run a demo-sized comparison in one process, and set its time beside its cells'."""
    recipe = ShareRecipe("related", "demo")
    start = time.perf_counter()
    world = recipe.prepare()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(recipe, world, range(recipe.seeds), Path(folder), jobs=1)
        Report(recipe.name, json.loads(json.dumps(recipe.settings(world))), rows).write(Path(folder))
    wall = time.perf_counter() - start
    cells = sum(row["cost"]["cell_seconds"] for row in rows)
    print(f"{len(rows)} cells: {cells:.1f} s; all of it: {wall:.1f} s; overhead {(wall - cells) / cells:.1%}")


if __name__ == "__main__":
    main()
