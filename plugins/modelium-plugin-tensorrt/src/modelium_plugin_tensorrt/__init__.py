"""Turns models into TensorRT engines for the GPU that serves them, while nobody waits for it."""
