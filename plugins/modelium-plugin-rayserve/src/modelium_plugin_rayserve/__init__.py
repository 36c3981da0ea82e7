"""Modelium's runtime for Ray Serve: an application for each model, on one machine or many."""
