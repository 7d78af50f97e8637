"""Prompts: records from files and generators, mixed by share into batches of whole groups."""

from marble.prompts.batch import PromptBatch, PromptMixture
from marble.prompts.record import Record
from marble.prompts.sources import load_source

__all__ = ["PromptBatch", "PromptMixture", "Record", "load_source"]
