"""Modelium's runtime for vLLM: a server process for each model."""
