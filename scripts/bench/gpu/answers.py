"""From a table's results to one line: what was found, or that nothing was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from gpu.report import Result

NOT_MEASURED: Final = "not measured"


def figures(results: Sequence[Result], name: str) -> list[float]:
    return [value for result in results if isinstance(value := result.figures.get(name), int | float)]


def spread(name: str, show: Callable[[float], str], words: str = "") -> Callable[[Sequence[Result]], str]:
    """`least to most` of a figure."""

    def answer(results: Sequence[Result]) -> str:
        found = figures(results, name)
        if not found:
            return NOT_MEASURED
        least, most = show(min(found)), show(max(found))
        return (least if least == most else f"{least} to {most}") + words

    return answer


def met(*which: str) -> Callable[[Sequence[Result]], str]:
    """How many results meet their aim, of those whose labels have all the words of `which`."""

    def answer(results: Sequence[Result]) -> str:
        verdicts = [r.figures.get("aim") for r in results if all(word in r.labels for word in which)]
        known = [verdict for verdict in verdicts if verdict is not None]
        return f"{known.count('met')} of {len(known)} cases" if known else NOT_MEASURED

    return answer


def at(name: str, show: Callable[[float], str], *labels: str) -> Callable[[Sequence[Result]], str]:
    """One figure of the result with these labels."""

    def answer(results: Sequence[Result]) -> str:
        found = figures([r for r in results if all(label in r.labels for label in labels)], name)
        return show(found[0]) if found else NOT_MEASURED

    return answer


def said(label: str) -> Callable[[Sequence[Result]], str]:
    """The `answer` in words of the results with this first label; by pool, where pools differ."""

    def answer(results: Sequence[Result]) -> str:
        found = {
            result.labels[1]: words
            for result in results
            if result.labels[0] == label and isinstance(words := result.figures.get("answer"), str)
        }
        if len(set(found.values())) > 1:
            return "; ".join(f"{pool}: {words}" for pool, words in found.items())
        return next(iter(found.values()), NOT_MEASURED)

    return answer


def tests(found: Sequence[Result]) -> str:
    passed, failed = (sum(figures(found, name)) for name in ("passed", "failed"))
    return f"{passed:.0f} passed, {failed:.0f} failed"


def sanitizer(found: Sequence[Result]) -> str:
    return ", ".join(f"{result.labels[0]}: {sum(figures([result], 'errors')):.0f} errors" for result in found)


def against_peers(found: Sequence[Result]) -> str:
    """The faster peer's time over ours, by case."""
    ratios = []
    for result in found:
        peers = figures([result], "flashinfer") + figures([result], "fa3")
        ours = figures([result], "seconds")
        if peers and ours:
            ratios.append(min(peers) / ours[0])
    if not ratios:
        return NOT_MEASURED
    slower = sum(ratio < 1 for ratio in ratios)
    return f"{min(ratios):.2f} to {max(ratios):.2f} times as fast; slower in {slower} of {len(ratios)} cases"


def layouts(found: Sequence[Result]) -> str:
    """page-major's rate over layer-major's, by case."""
    by_case: dict[tuple[str, ...], dict[str, float]] = {}
    for result in found:
        for rate in figures([result], "gb_s"):
            by_case.setdefault((result.labels[0], *result.labels[2:]), {})[result.labels[1]] = rate
    ratios = [rates["page-major"] / rates["layer-major"] for rates in by_case.values() if len(rates) == 2]
    return f"{min(ratios):.2f} to {max(ratios):.2f} times layer-major's rate" if ratios else NOT_MEASURED


def deterministic(found: Sequence[Result]) -> str:
    plain, fixed = (
        figures([r for r in found if r.labels == (name, "32")], "step") for name in ("runner", "runner, deterministic")
    )
    return f"{fixed[0] / plain[0]:.2f} times as long" if plain and fixed else NOT_MEASURED
