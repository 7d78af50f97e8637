"""Learns how a pipeline calls its denoiser by watching it do so."""

from __future__ import annotations

from marble.watch.broken import first_broken
from marble.watch.conditioning import Conditioning
from marble.watch.learn import PromptsMixedUpError, learn
from marble.watch.manner import Manner
from marble.watch.watch import Seen, Watch

__all__ = ["Conditioning", "Manner", "PromptsMixedUpError", "Seen", "Watch", "first_broken", "learn"]
