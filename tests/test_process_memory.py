"""What of the process's memory others of its user's processes, and a core dump, get to see."""

import subprocess
import sys
from typing import Final

LOOK: Final = """
import ctypes, os, subprocess
from backend.adapters.host.process_memory import keep_private
keep_private()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
print(subprocess.run(["sh", "-c", "ulimit -Sc; ulimit -Hc"], capture_output=True, text=True).stdout.split())
print(len(os.listdir("/proc/self/fd")) > 2)
"""


def test_a_core_dump_or_a_debugger_shows_no_key_of_the_process_or_of_wg() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    # Its own descriptors stay its own, though /proc/PID is root's now.
    assert done.stdout.splitlines() == ["0", "['0', '0']", "True"]
