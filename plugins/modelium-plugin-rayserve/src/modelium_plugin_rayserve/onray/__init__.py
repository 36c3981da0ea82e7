"""What runs under Ray's own interpreter, where there is no Modelium: standard library, numpy, and what Ray brings.

`controller` talks to the cluster for the driver. All else is sent to replicas by value, so that the cluster's nodes
need nothing of ours installed.
"""
