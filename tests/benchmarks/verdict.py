"""The goals of `make bench`, and its figures for a person to read."""

from dataclasses import dataclass
from typing import Any, Final

from tests.benchmarks.measures import Scale

# The no-op's latency on the machine for which the goal of GET /peers was set, milliseconds.
_REFERENCE_NOOP_MS: Final = 0.09


@dataclass
class Goal:
    """One line of the verdict."""

    goal: str
    measured: float
    limit: float
    at_most: bool = True
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is met."""
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


def verdict(figures: dict[str, Any], scale: Scale) -> list[Goal]:
    """Compare the figures with the goals."""
    sequential_, first, last = figures["sequential"], scale.sizes[0], scale.sizes[-1]
    storm_, start_ = figures["storm"], figures["start"]
    resident = figures["resident KiB"]
    goals = [
        Goal(f"1 flat: p50 at {last} / at {first}", sequential_[last]["add"] / sequential_[first]["add"], 1.5)
    ]
    goals += [
        Goal(f"2 near: add / floor at {size}", found["add"] / found["floor"], 3.0)
        for size, found in sequential_.items()
    ]
    for size, found in figures["shared"].items():
        note = "the generator was the limit" if found["generator"] > 0.95 else ""
        goals.append(
            Goal(
                f"3 shared: add / no-op at {size}",
                found["add"] / found["noop"],
                0.2,
                at_most=False,
                note=note,
            )
        )
    goals += [
        Goal("4 storm: known nodes / no-op", storm_["again"] / storm_["noop"], 0.5, at_most=False),
        Goal("4 storm: one peer / no-op", storm_["one"] / storm_["noop"], 0.5, at_most=False),
        Goal("4 storm: whole list, ms", storm_["list ms"], 6 * storm_["noop ms"] / _REFERENCE_NOOP_MS),
    ]
    goals += [
        Goal(f"5 delete / add at {size}", found["delete"] / found["add"], 1.25)
        for size, found in sequential_.items()
    ]
    limit = 1.5 * start_["cold syncconf"] + start_["imports"]
    goals.append(Goal(f"6 start at {last}, ms", start_["start"], limit))
    per_peer = (resident[last] - resident[first]) / (last - first)
    goals.append(Goal("6 memory, KiB a peer", per_peer, 2.0))
    with_token, without = figures["access control"]["token"], figures["access control"]["without"]
    goals.append(Goal("7 access control: with / without", with_token / without, 0.9, at_most=False))
    goals += [
        Goal(f"8 watching: {name}, with / without", ratio, 1.05)
        for name, ratio in figures["watching"].items()
    ]
    scrape = figures["scrape"]
    goals += [
        Goal(f"8 look at {last} / one pass", scrape["look ms"] / scrape["pass ms"], 12.0),
        Goal(f"8 scrape at {last} / one pass", scrape["scrape ms"] / scrape["pass ms"], 6.0),
        Goal("8 with each peer / one pass", scrape["scrape with each peer ms"] / scrape["pass ms"], 20.0),
        Goal("8 longest piece / one pass", scrape["longest piece ms"] / scrape["pass ms"], 1.5),
    ]
    return goals


def table(figures: dict[str, Any], goals: list[Goal]) -> str:
    """Return the figures and the verdict for a person."""
    lines = ["", "sequential, p50 in ms"]
    columns = ["add", "delete", "floor", "commit", "file", "wg set", "wg remove", "syncconf", "noop"]
    lines.append(" ".join(f"{title:>9}" for title in ["peers", *columns]))
    for size, found in figures["sequential"].items():
        lines.append(" ".join([f"{size:>9}", *(f"{found[column]:>9.2f}" for column in columns)]))
    lines += ["", "64 clients, answers a second"]
    for size, found in figures["shared"].items():
        rates = "  ".join(f"{name} {found[name]:.0f}" for name in ("add", "delete", "noop"))
        lines.append(f"{size:>9}  {rates}  (generator's CPU {found['generator']:.2f})")
    for part in ("storm", "access control", "start", "resident KiB", "watching", "scrape"):
        lines += ["", part, "  ".join(f"{name}: {value:.2f}" for name, value in figures[part].items())]
    for size, found in figures["breakdown"].items():
        lines += ["", f"one request at {size} peers, ms"]
        lines += [f"{value:>9.2f}  {name}" for name, value in found.items()]
    lines.append("")
    for goal in goals:
        sign = "<=" if goal.at_most else ">="
        word = "pass" if goal.passed else "FALLS SHORT"
        lines.append(f"{goal.goal:<36} {goal.measured:>9.2f} {sign} {goal.limit:<9.2f} {word} {goal.note}")
    return "\n".join(lines)
