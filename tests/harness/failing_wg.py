"""A `wg` that fails when a test says so, with the real one behind it."""

import shutil
from pathlib import Path


class FailingWg:
    """A `wg` that comes before the real one in PATH: runs it, or fails in the way that its mood says."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self._mood = directory / "mood"
        real = shutil.which("wg")
        script = directory / "wg"
        # `fails` refuses; `lies` does the work and reports a failure; `held` lasts until the mood changes,
        # and fails; `hangs` lasts for 20 seconds.
        script.write_text(
            "#!/bin/sh\n"
            # `addconf` is started before its input comes, and counts as a `set` from then on.
            "what=$1\n"
            '[ "$what" = addconf ] && { input=$(cat); what=set; }\n'
            'real() { if [ "$1" = addconf ]; then printf "%s\\n" "$input" |'
            f' {real} "$@"; else {real} "$@"; fi; }}\n'
            f"mood=$(cat {self._mood} 2>/dev/null)\n"
            'case "$what-$mood" in\n'
            "  syncconf-fails|set-fails) echo 'the device is on fire' >&2; exit 1;;\n"
            "  syncconf-hangs|set-hangs) exec sleep 20;;\n"
            f'  syncconf-held|set-held) while [ "$(cat {self._mood})" = held ]; do sleep 0.02; done\n'
            "    exit 1;;\n"
            "  syncconf-lies|set-lies) real \"$@\"; echo 'lost the answer' >&2; exit 1;;\n"
            "esac\n"
            'real "$@"\n'
        )
        script.chmod(0o755)

    def be(self, mood: str) -> None:
        """Set the mood: `works`, `fails`, `lies`, `held` or `hangs`."""
        # In one step, so that nothing reads a file that is empty for a moment.
        new = self._mood.with_suffix(".new")
        new.write_text(mood)
        new.replace(self._mood)
