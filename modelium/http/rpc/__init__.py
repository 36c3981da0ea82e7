"""KServe v2 over gRPC: the same models, the same contract as over HTTP.

Calls about one model are passed on as the bytes that they are: nothing is parsed but the model's name.
"""

import os

# gRPC warns of forks beside its threads, when it was told by its first import; ours are safe, since each becomes
# another program at once.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
