"""What follows from the times: ratios, a table, the content of the JSON file."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from at_smooth.bench.machine import in_words
from at_smooth.bench.workload import Variant, Workload
from at_smooth.tables import Table

_CLEARLY = 1.05  # times as long: more than noise

#: The rounds of one contender: what its worker answered to each.
Rounds = list[dict[str, Any]]


def ratio(above: Rounds, below: Rounds) -> float:
    """How many times as long the steps of one contender take as those of another.

    It is the median over the rounds of the ratio of their median steps: both worked right after one another in a
    round, so what slows the machine down for a minute drops out.
    """
    ratios: list[float] = [median(a["seconds"]) / median(b["seconds"]) for a, b in zip(above, below, strict=True)]
    return median(ratios)


@dataclass
class Measured:
    """All times of a benchmark.

    Attributes:
        workload: What was timed.
        variants: The engine's arithmetics.
        machine: Where.
        about: What each contender's worker said of itself, by the contender's name.
        rounds: What it answered to each round, likewise; ``seconds`` are those of each step.
    """

    workload: Workload
    variants: tuple[Variant, ...]
    machine: dict[str, Any]
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounds: dict[str, Rounds] = field(default_factory=dict)

    def step_seconds(self, contender: str) -> float:
        """The median over all steps of all rounds."""
        seconds: list[float] = [second for one in self.rounds[contender] for second in one["seconds"]]
        return median(seconds)

    def speedup(self, variant: Variant) -> float:
        """The plain loop's time over the engine's."""
        return ratio(self.rounds["plain"], self.rounds[f"engine {variant}"])

    def overhead(self, variant: Variant) -> float:
        """What the engine takes beyond the bare passes, as a share of theirs; below 0 where it takes less."""
        return ratio(self.rounds[f"engine {variant}"], self.rounds[f"bare {variant.passes}"]) - 1

    def plain_overhead(self) -> float | None:
        """The same of the plain loop, against the bare passes in float32, where these were timed."""
        bare = self.rounds.get("bare fp32")
        return ratio(self.rounds["plain"], bare) - 1 if bare else None

    def rate(self, precision: str, of: str = "forward") -> float | None:
        """Operations a second of the network's own layers, each alone; None for a network without any.

        Args:
            precision: ``"fp32"`` or ``"bf16"``.
            of: ``"forward"``, or ``"backward"`` for the pass to the input alone.
        """
        flops = self.about[f"rate {precision}"]["layer_flops"]
        seconds = median(one[f"{of}_seconds"] for one in self.rounds[f"rate {precision}"])
        return flops / seconds if flops else None

    def share(self, contender: str, precision: str) -> float | None:
        """The share of the forward rate that a contender's steps reach."""
        rate = self.rate(precision)
        return self.about["rate fp32"]["step_flops"] / self.step_seconds(contender) / rate if rate else None

    def memory(self, contender: str) -> dict[str, float | None]:
        """``peak_mb`` and ``rise_mb`` after the last round."""
        last = self.rounds[contender][-1]
        return {name: last[name] for name in ("peak_mb", "rise_mb")}

    @property
    def rate_kind(self) -> str:
        """``convolution``, or ``matmul`` for a network without convolutions."""
        return str(self.about["rate fp32"]["kind"])

    def to_dict(self) -> dict[str, Any]:
        """Every figure in plain types; ratios and shares are numbers, not percent."""
        figures: dict[str, Any] = {}
        for variant in self.variants:
            key, passes = variant.key, variant.passes
            figures[f"speedup_{key}"] = self.speedup(variant)
            figures[f"overhead_{key}"] = self.overhead(variant)
            figures[f"share_{key}"] = self.share(f"engine {variant}", variant.precision)
            figures[f"share_bare_{passes.key}"] = self.share(f"bare {passes}", variant.precision)
            if not variant.compile:
                figures[f"memory_over_plain_{key}"] = self.memory_over_plain(variant)
        figures["overhead_plain"] = self.plain_overhead()
        figures["share_plain"] = self.share("plain", "fp32")
        timed = [name for name in self.rounds if not name.startswith("rate ")]
        rates = [name.partition(" ")[2] for name in self.rounds if name.startswith("rate ")]
        return {
            **figures,
            "step_ms": {name: 1000 * self.step_seconds(name) for name in timed},
            "memory_mb": {name: self.memory(name) for name in timed if "+compile" not in name},
            "step_gflop": self.about["rate fp32"]["step_flops"] / 1e9,
            "rate_kind": self.rate_kind,
            "rate_gflops": {
                precision: {of: _giga(self.rate(precision, of)) for of in ("forward", "backward")}
                for precision in rates
            },
            "rounds": {name: [one["seconds"] for one in self.rounds[name]] for name in timed},
            "machine": self.machine,
            "workload": self.workload.to_dict(),
        }

    def memory_over_plain(self, variant: Variant) -> float | None:
        """What the engine's steps took at most over what the plain loop's did, both beyond what was there before."""
        ours, plain = self.memory(f"engine {variant}")["rise_mb"], self.memory("plain")["rise_mb"]
        return ours / plain if ours is not None and plain else None

    def table(self) -> Table:
        """A row a contender."""
        kind = "conv." if self.rate_kind == "convolution" else self.rate_kind
        rows = {"plain loop": self._row("plain", "fp32", "1.00", _percent(self.plain_overhead()))}
        for variant in self.variants:
            speedup, overhead = f"{self.speedup(variant):.2f}", _percent(self.overhead(variant))
            rows[f"engine {variant}"] = self._row(f"engine {variant}", variant.precision, speedup, overhead)
            bare = f"bare {variant.passes}"
            times = f"{ratio(self.rounds['plain'], self.rounds[bare]):.2f}"
            rows[f"bare passes {variant.passes}"] = self._row(bare, variant.precision, times, "-")
        return Table(
            f"one step of {self.workload.recipe.model}, batch {self.workload.recipe.batch_size} of "
            f"{'x'.join(map(str, self.workload.shape))}, PGD-{self.workload.attack.steps} "
            f"({self.workload.attack.mode} mode)",
            ["contender", "step, ms", "speedup", "overhead", f"of {kind} rate", "peak, MB", "rise, MB"],
            [[name, *row] for name, row in rows.items()],
        )

    def lines(self) -> list[str]:
        """The machine, the rates and the memory, a sentence each."""
        found = [f"machine: {in_words(self.machine)}"]
        for name in self.rounds:
            kind, _, precision = name.partition(" ")
            forward = self.rate(precision) if kind == "rate" else None
            backward = self.rate(precision, "backward") if kind == "rate" else None
            if forward and backward:
                found.append(
                    f"{self.rate_kind} rate in {precision}: {forward / 1e9:.4g} GFLOP/s forward, "
                    f"{backward / 1e9:.4g} backward to the input"
                )
        if {Variant("fp32"), Variant("bf16")} <= set(self.variants):
            longer = ratio(self.rounds["engine bf16"], self.rounds["engine fp32"])
            if longer > _CLEARLY:
                found.append(f"bf16 takes {longer:.2f} times as long as fp32 here: train with --precision fp32")
        for variant in self.variants:
            over = None if variant.compile else self.memory_over_plain(variant)
            if over is not None:
                verdict = "at most" if over <= 1 else "more than"
                found.append(f"memory of steps, engine {variant}: {over:.2f} times, {verdict} the plain loop's")
        return found

    def _row(self, contender: str, precision: str, speedup: str, overhead: str) -> list[str]:
        share = self.share(contender, precision)
        memory = {} if "+compile" in contender else self.memory(contender)
        megabytes = [_whole(memory.get(name)) for name in ("peak_mb", "rise_mb")]
        return [f"{1000 * self.step_seconds(contender):.4g}", speedup, overhead, _percent(share), *megabytes]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9
