"""Prompts of the demonstration: 40 in each of eight topics, written for remoe."""

from pathlib import Path

PROMPTS = Path(__file__).with_name("prompts.jsonl")
