"""Prompts, sampled responses, and imports of both."""
