"""Tells whether other users could change a file that this process reads, writes or runs (sshd's StrictModes).

A directory isn't safe by its own mode alone: a user who may write to one above it can replace it. So each
step of the way from the root is checked, and the way that a link leads as well.

Trusted are root, this process's user, and the owner of this program, who can change what it does anyhow:
`sudo make run` in a user's checkout works for that user.

It is here and not among the host's adapters because the settings, which know no adapter, read a `.env` only
if it passes this check.
"""

import grp
import os
import pwd
import shlex
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from backend.errors import StartRefusedError

# As many links as Linux follows itself (path_resolution(7)).
_MOST_LINKS: Final = 40


@dataclass(frozen=True, slots=True)
class _Step:
    """One step on the way to a path. `shared`: it's in a directory like /tmp. `last`: the way ends here."""

    path: Path
    status: os.stat_result
    shared: bool
    last: bool

    @property
    def is_link(self) -> bool:
        """Whether it's a symbolic link; `status` is the link's own."""
        return stat.S_ISLNK(self.status.st_mode)

    @property
    def is_sticky(self) -> bool:
        """Whether only its owner, and a file's own, can rename or remove a file in it (unlink(2), EPERM)."""
        return stat.S_ISDIR(self.status.st_mode) and bool(self.status.st_mode & stat.S_ISVTX)


def require_trusted(path: Path, what: str) -> None:
    """Refuse a file or directory that others could change: StartRefusedError, with the remedy.

    A path that doesn't exist or can't be read passes: to use it fails by itself.
    """
    if problem := problem_with(path):
        raise StartRefusedError(f"{what} is within other users' reach: {problem}")


def require_trusted_file(path: Path, what: str) -> None:
    """Refuse a file, made already or not, that others could change, or put files of theirs beside."""
    require_trusted(path, what)
    require_trusted(Path(os.path.realpath(path)).parent, what)


def problem_with_file(path: Path) -> str | None:
    """Say how others could change a file, or put theirs beside it, and what to do; None if they can't."""
    return problem_with(path) or problem_with(Path(os.path.realpath(path)).parent)


def make_private_directory(directory: Path) -> None:
    """Make the directory and those above it, each 0700 whatever the umask; what is there stays as it is."""
    if directory.is_dir():
        return
    if directory.parent != directory:
        make_private_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)


def problem_with(path: Path) -> str | None:
    """Say what of the way to `path` others could change, and what to do about it; None if they can't."""
    user = os.geteuid()
    users = {0, user, Path(__file__).stat().st_uid}
    for step in _way(path):
        owner, place = step.status.st_uid, shlex.quote(str(step.path))
        # Who owns a link can't change it. In /tmp they could have made it.
        if owner not in users and (step.shared or not step.is_link):
            return (
                f"{step.path} belongs to {_user_name(owner)}; run `chown {_user_name(user)} {place}`, or "
                "choose another place"
            )
        if not _others_write(step, users):
            continue
        if not step.is_sticky:
            return (
                f"they can write to {step.path} (mode {stat.S_IMODE(step.status.st_mode):04o}); run "
                f"`chmod go-w {place}`, or choose another place"
            )
        if step.last:
            return f"they can make files in {step.path}; choose another place"
    return None


def _way(path: Path) -> Iterator[_Step]:
    """Yield each step of the way from the root to `path`, through links, as far as it exists."""
    here, shared, links = Path("/"), False, 0
    # The next one is at the end.
    names = [*reversed(path.absolute().parts)]
    with suppress(OSError):
        while names:
            # The root replaces everything before it; `here` is never a link, so ".." is just its parent.
            name = names.pop()
            there = here.parent if name == ".." else here / name
            status = there.lstat()
            step = _Step(there, status, shared and name not in {"/", ".."}, last=not names)
            if not step.is_link:
                yield step
                here, shared = there, step.is_sticky
                continue
            yield replace(step, last=False)
            links += 1
            if links > _MOST_LINKS:
                return
            names += reversed(there.readlink().parts)


def _others_write(step: _Step, users: Collection[int]) -> bool:
    mode = step.status.st_mode
    # A link's mode means nothing.
    return not step.is_link and bool(
        mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _is_private_group(step, users))
    )


def _is_private_group(step: _Step, users: Collection[int]) -> bool:
    """Tell whether the group has trusted users alone, as the one that Debian makes for each user.

    Where users have such groups, the umask is 002 (pam_umask(8)) and all that they make is group-writable.
    """
    try:
        group = grp.getgrgid(step.status.st_gid)
    except KeyError:
        return False
    names = {_user_name(user) for user in users}
    return group.gr_name in names and names.issuperset(group.gr_mem) and not _has_acl(step.path)


def _has_acl(path: Path) -> bool:
    """Tell whether the group's bits may be the mask of an access control list (acl(5))."""
    try:
        return bool(os.getxattr(path, "system.posix_acl_access"))
    except OSError:
        return False


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
