"""Modelium's runtime for NVIDIA Triton Inference Server."""
