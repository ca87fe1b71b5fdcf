"""What messages tell an operator to type, as it works on this host."""

import os
from typing import Final

# deploy/wireguard-provisioning.service and the wrapper beside it set it to the wrapper's name. Without it the
# unit's user, state directory and settings would have to be typed as well.
VARIABLE: Final = "PROVISIONING_COMMAND"


def command(words: str) -> str:
    """Return one of this service's commands, such as `python -m backend hub up`, in backquotes."""
    return f"`{os.environ.get(VARIABLE) or 'python -m backend'} {words}`"


def bring_up(interface: str) -> str:
    """Return what makes the hub's interface.

    Never `wg-quick` under the unit: it would run hooks from a file that the service may write, as root.
    """
    ours = command("hub up")
    return ours if os.environ.get(VARIABLE) else f"{ours} or `wg-quick up {interface}`"


def put_key_back(interface: str) -> str:
    """Return where the hub's own private key is when its config has lost it.

    Never a command that makes a new one: every node that has joined would be cut off.
    """
    return (
        f"Put the hub's own key back: `wg show {interface} private-key` has it while the interface lives, "
        "and so has a backup. A new key would cut off every node that has joined"
    )
