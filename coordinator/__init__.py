"""The coordinator of Muster: its pure core, the daemon around it, and the operator's command."""

import os

# gRPC reads this when it is imported, and writes to standard error whatever goes wrong in a stranger's
# handshake.  What a call of ours comes to, we log or print ourselves.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
