"""Every number of the demo in one table, no wider than 80 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ckptbridge.demo.stage import STYLES


def results_table(results: dict[str, Any]) -> Table:
    """A row a number, grouped by step; checks say what was wanted and whether it held."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("every number", overflow="fold")
    table.add_column("", justify="right", overflow="fold")
    table.add_column("wanted", no_wrap=True)
    for step in results["steps"].values():
        seconds = f"{step['seconds']:.1f} s" if "seconds" in step else ""
        table.add_row(_mark(step["passed"]), Text(step["title"], style="bold"), Text(seconds, style="dim"), "")
        if told := step.get("skipped") or step.get("error"):
            table.add_row("", Text(f"  {told}", style=STYLES[False] if "error" in step else "yellow"), "", "")
        for number in step.get("numbers", {}).values():
            label, value = Text(f"  {number['label']}"), Text(number["text"])
            table.add_row(_mark(number.get("passed")), label, value, number.get("wanted", ""))
    table.add_row("", Text("the whole run", style="bold"), Text(f"{results['seconds']:.1f} s", style="dim"), "")
    table.add_row("", "  peak memory", f"{results['peak_rss_bytes'] / 1e9:.2f} GB", "")
    return table


def _mark(passed: bool | None) -> Text:
    return Text("") if passed is None else Text("✓" if passed else "✗", style=STYLES[passed])
