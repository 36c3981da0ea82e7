"""KServe v2 over gRPC: the same models, the same contract as over HTTP.

Calls about one model are passed on as the bytes that they are: nothing is parsed but the model's name.
"""
