"""Sizes in sentences and tables: one way everywhere, so that figures can be compared by eye."""

from __future__ import annotations


def human(size: float) -> str:
    """`1.5 GB`: powers of 1000, as disks and models are sold."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "kB") or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
