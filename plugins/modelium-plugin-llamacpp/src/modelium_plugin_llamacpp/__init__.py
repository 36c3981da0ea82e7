"""Modelium's runtime for llama.cpp: a server process for each GGUF model."""
