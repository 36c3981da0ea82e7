"""`make bench`: measures, prints a table, judges nothing. Timings are of this machine in this minute: compare ratios.

python -m tests.bench [core] [startup] [drops] [front] [openai] [restart] [herd] [crowd] [swaps] [estimates]
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

PARTS = ("core", "startup", "drops", "front", "openai", "restart", "herd", "crowd", "swaps", "estimates")


def main(parts: list[str]) -> int:
    console = Console(width=140)
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        console.print(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
        return 2
    table = Table("what", "measured", "bar", title="Modelium, measured", title_justify="left")
    for part in parts or PARTS:
        console.print(f"measuring {part} ...", style="dim")
        module = import_module(f"tests.bench.{part}")
        with tempfile.TemporaryDirectory(prefix="modelium-bench-", ignore_cleanup_errors=True) as folder:
            for row in module.rows(Path(folder)):
                table.add_row(*row)
                console.print("  ".join(row), style="dim")
        table.add_section()
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
