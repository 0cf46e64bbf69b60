"""`python -m tests.fuzz NAME [libFuzzer options]`: one target under atheris, for as long as it is let run.

NAME may be `all`: each target in turn, for SECONDS seconds (default 60) each, in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def fuzz(name: str, options: list[str]) -> int:
    import atheris  # an optional dependency, from the extra `fuzz`

    with atheris.instrument_imports(include=["agent", "coordinator", "protos", "trainer"]):
        from tests.fuzz.targets import TARGETS

    if name not in TARGETS:
        print(f"target {name!r} is unknown; known are all, {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    target = TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="muster-corpus-") as corpus:
        for number, data in enumerate(target.corpus):
            (Path(corpus) / str(number)).write_bytes(data)
        atheris.Setup([sys.argv[0], *options, corpus], target.read)
        atheris.Fuzz()
    return 0


def main() -> int:
    name, *options = sys.argv[1:] or [""]
    if name != "all":
        return fuzz(name, options)
    from tests.fuzz.targets import TARGETS

    seconds = options[0] if options else "60"
    for each in TARGETS:
        print(f"fuzzing {each} for {seconds} s", flush=True)
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            each,
            f"-max_total_time={seconds}",
            "-rss_limit_mb=4096",
        ]
        if status := subprocess.run(command, check=False).returncode:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
