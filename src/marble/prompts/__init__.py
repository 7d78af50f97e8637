"""Prompts: records from generators, files and data sets, mixed by share into batches of whole groups."""

from marble.prompts.batch import PromptBatch, PromptMixture
from marble.prompts.record import Record
from marble.prompts.sources import load_mixture, load_source, needs_download

__all__ = ["PromptBatch", "PromptMixture", "Record", "load_mixture", "load_source", "needs_download"]
