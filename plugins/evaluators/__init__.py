"""Evaluators: which examples a model still gets right."""
