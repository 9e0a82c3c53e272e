"""Measurements with models on frozen contexts: scores, one step, interventions, attribution."""
