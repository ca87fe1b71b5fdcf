"""How a credential reads, to find one where none belongs."""

import re
from typing import Final

SECRET_TEXT: Final = re.compile(r"ocw_([0-9a-f]{16})_([0-9a-f]{64})")


def redacted(text: str) -> str:
    """Return a text without the secrets of the credentials in it, for whoever repeats what was sent."""
    return SECRET_TEXT.sub(r"ocw_\1_***", text) if "ocw_" in text else text


def require_no_secret(text: str) -> str:
    """Return the text; raise a ValueError that doesn't repeat it where there is a credential in it."""
    if "ocw_" in text and SECRET_TEXT.search(text) is not None:
        raise ValueError("this is a credential, which belongs into the header Authorization; revoke it")
    return text
