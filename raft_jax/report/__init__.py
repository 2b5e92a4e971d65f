"""The results of a run or a comparison: tables for the terminal, and self-contained HTML pages."""

from pathlib import Path

from raft_jax.errors import require_train
from raft_jax.report.comparison_page import write_comparison
from raft_jax.report.comparison_tables import comparison_tables, print_comparison
from raft_jax.report.page import write_report
from raft_jax.report.summary import print_summary, summary_tables

require_train("jinja2", "omegaconf", "rich")

__all__ = [
    "comparison_tables",
    "print_comparison",
    "print_summary",
    "summary_tables",
    "write_comparison",
    "write_report",
    "write_reports",
]


def write_reports(run_dir: Path) -> list[Path]:
    """Writes the report of a run, and the page of the comparison that its folder may hold; returns their paths."""
    pages = [write_report(run_dir), write_comparison(run_dir)]
    return [page for page in pages if page is not None]
