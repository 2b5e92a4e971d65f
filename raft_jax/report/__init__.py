"""The results of a run: tables for the terminal, and one self-contained HTML page."""

from raft_jax.errors import require_train
from raft_jax.report.page import write_report
from raft_jax.report.summary import print_summary, summary_tables

require_train("jinja2", "omegaconf", "rich")

__all__ = ["print_summary", "summary_tables", "write_report"]
