"""Modelium makes a machine full of models run itself, beside NVIDIA Triton Inference Server."""

__version__ = "0.1.0"
