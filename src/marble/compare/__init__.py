"""Methods side by side under one budget: cells made and kept, a table, a verdict and a page."""

from marble.compare.arms import Arm, parse_arms
from marble.compare.cells import Crew, Work, choose_place
from marble.compare.content import describe, load_comparison, table_of, write_comparison
from marble.compare.folder import Cell, Comparison
from marble.compare.page import write_page
from marble.compare.results import Result, Results, gather, read_result
from marble.compare.runs import side_by_side

__all__ = [
    "Arm",
    "Cell",
    "Comparison",
    "Crew",
    "Result",
    "Results",
    "Work",
    "choose_place",
    "describe",
    "gather",
    "load_comparison",
    "parse_arms",
    "read_result",
    "side_by_side",
    "table_of",
    "write_comparison",
    "write_page",
]
