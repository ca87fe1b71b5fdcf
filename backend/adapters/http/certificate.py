"""The certificate that the service shows, read again when its files change: uvicorn reads it once."""

import errno
import logging
import ssl
import stat
import time
from pathlib import Path
from typing import Final

from backend.errors import StartRefusedError

log = logging.getLogger(__name__)

# Looks whether the files have changed at most that often, when a connection comes.
_LOOK_SECONDS: Final = 1.0

_Identity = tuple[tuple[int, int, int, int], ...]


class Certificate:
    """The certificate with its chain and the private key, in PEM, as the files have them now."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read the files; raise StartRefusedError where they can't be used."""
        self._files = (certificate, key)
        self._looked_at = time.monotonic()
        # Of the files that the context was made from, and what was logged last of others.
        self._identity: _Identity = ()
        self._logged: tuple[_Identity, str] = ((), "")
        try:
            self._identity = self._look()
            self._context = self._read()
        except OSError as exc:  # ssl.SSLError is one
            raise StartRefusedError(
                f"--tls-cert {certificate} and --tls-key {key} can't be used ({_reason(exc)}); they take a "
                "certificate with its chain and its private key, in PEM, that this user may read"
            ) from None

    def context(self) -> ssl.SSLContext:
        """Return what the next handshake uses. Files that can't be used change nothing, and the log says so.

        A new certificate and a new key come one after the other, and may be given to this user later still:
        they are read again until they fit.
        """
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return self._context
        self._looked_at = now
        identity: _Identity = ()
        try:
            identity = self._look()
            if identity != self._identity:
                self._context = self._read()
                self._identity = identity
                log.info("certificate_read_again", extra={"file": self._files[0]})
        except OSError as exc:
            self._log_unusable(identity, _reason(exc))
        return self._context

    def _log_unusable(self, identity: _Identity, reason: str) -> None:
        if (identity, reason) != self._logged:
            self._logged = (identity, reason)
            log.error("certificate_unusable", extra={"file": self._files[0], "reason": reason})

    def _look(self) -> _Identity:
        stats = [path.stat() for path in self._files]
        if not all(stat.S_ISREG(found.st_mode) for found in stats):
            # A read from a named pipe blocks the event loop until another process writes to it.
            raise OSError(errno.EINVAL, "not a regular file")
        return tuple((found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size) for found in stats)

    def _read(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate, key = self._files
        # Without a password, the library would ask for one at the terminal.
        context.load_cert_chain(certificate, key, password="")
        context.set_alpn_protocols(["http/1.1"])
        return context


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "no certificate and key in PEM"
    return error.strerror or type(error).__name__
