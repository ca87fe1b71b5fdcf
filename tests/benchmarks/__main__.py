"""`make bench`: the service against its limits, or against another commit, in one run, as ratios.

    python -m tests.benchmarks [--quick] [--json] [--against COMMIT [--pairs N]]

Everything runs in namespaces of its own: wireguard-go hubs, each service as a real process over a real
socket, a no-op FastAPI app on the same server, and a load generator. What is compared is measured in turns,
so that a machine that is slow for a while is slow for both.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

from tests.benchmarks import against
from tests.benchmarks.measures import FULL, QUICK, measure
from tests.benchmarks.verdict import table, verdict
from tests.harness.namespaces import Guard, enter_new_namespaces


def say(text: str) -> None:
    """Report progress."""
    sys.stderr.write(f"... {text}\n")


def measure_alone(*, quick: bool, as_json: bool) -> str:
    """Measure the service of the working tree; return what to print."""
    scale = QUICK if quick else FULL
    figures = measure(scale, say)
    goals = verdict(figures, scale)
    if as_json:
        verdicts = [asdict(goal) | {"passed": goal.passed} for goal in goals]
        return json.dumps({"figures": figures, "goals": verdicts}, indent=2)
    return table(figures, goals)


def measure_against(commit: str, pairs: int, *, quick: bool, as_json: bool) -> str:
    """Measure the service of the working tree and that of a commit; return what to print."""
    scale = replace(against.QUICK if quick else against.FULL, pairs=pairs)
    ratios = against.measure(commit, scale, say)
    if as_json:
        return json.dumps([ratio.summary() for ratio in ratios], indent=2)
    return against.table(commit, ratios)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer requests: in about two minutes")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--against", metavar="COMMIT", help="compare the working tree with this commit")
    parser.add_argument("--pairs", type=int, default=7, help="how many, with --against: more are surer")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.stderr.write("the bench makes network namespaces and interfaces: run it as root\n")
        return 1
    enter_new_namespaces()
    guard = Guard.of_this_process()
    try:
        if arguments.against is None:
            text = measure_alone(quick=arguments.quick, as_json=arguments.json)
        else:
            text = measure_against(
                arguments.against, arguments.pairs, quick=arguments.quick, as_json=arguments.json
            )
    except subprocess.CalledProcessError as exc:
        sys.stderr.write(f"{exc}\n{(exc.stderr or b'').decode(errors='replace')}")
        return 1
    finally:
        guard.close()
    sys.stdout.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
