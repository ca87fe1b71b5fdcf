"""The service with a hard limit on its file descriptors: `serve`'s arguments, the limit in DESCRIPTORS.

Run as a module, in place of `backend`, by tests about what happens when there are not enough.
"""

import os
import resource

from backend import __main__ as command_line

if __name__ == "__main__":
    limit = int(os.environ.pop("DESCRIPTORS"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    command_line.app(prog_name="service with few descriptors")
