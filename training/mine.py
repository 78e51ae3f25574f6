"""Sort the scored clips of a store into winners and losers: ``python -m training.mine``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import write_json
from spatialalign.score import DsrScore
from training.cli import command
from training.pairs import PromptPairs, classify, manifest
from training.score import read_score
from training.stages import stage_log
from training.store import Store

WINNER_THRESHOLD = 0.7


@dataclass(frozen=True)
class Mine:
    """Find the prompts with at least one winner and one loser, and list their clips for training."""

    store: Path
    """Sample store with scores."""
    out: Path | None = None
    """Where the list goes; null for pairs.json in the store."""
    score: Literal["official", "robust"] = "official"
    """Which of the two scores decides."""
    threshold: float | None = None
    """A clip with at least this score wins, one below it loses; null for 0.7, or the robust score's own threshold."""
    model: str | None = None
    """Only clips that this model made, by the name their files record; null for all."""


@dataclass
class Mined:
    """What was found: prompts for training, and what was left out, with reasons."""

    prompts: list[PromptPairs] = field(default_factory=list)
    winners: int = 0
    losers: int = 0
    invalid: int = 0
    only_winners: int = 0
    only_losers: int = 0
    unusable: list[tuple[str, str]] = field(default_factory=list)

    def statistics(self) -> dict[str, Any]:
        """Counts for the manifest; winners and losers are those of the whole store."""
        return {
            "prompts_with_pairs": len(self.prompts),
            "prompts_with_winners_only": self.only_winners,
            "prompts_with_losers_only": self.only_losers,
            "pairs": sum(len(p.winners) * len(p.losers) for p in self.prompts),
            "winners": self.winners,
            "losers": self.losers,
            "invalid": self.invalid,
            "unusable": [{"sample": name, "reason": reason} for name, reason in self.unusable],
        }

    def text(self) -> str:
        """The outcome in words."""
        counts = self.statistics()
        lines = [
            f"mine: {counts['pairs']} pairs from {len(self.prompts)} prompts ({self.winners} winners, {self.losers} "
            f"losers, {self.invalid} INVALID, {len(self.unusable)} unusable; {self.only_winners} prompts had winners "
            f"only, {self.only_losers} losers only)"
        ]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.unusable[:20]])


def mine(
    store: Store,
    score: Literal["official", "robust"] = "official",
    threshold: float | None = None,
    model: str | None = None,
) -> Mined:
    """Classify every sample (methods: official train.py) and keep prompts with at least one winner and one loser.

    A sample without score, of another model than ``model``, or whose latents cannot be trained on, is left out with its
    reason.

    Raises:
        DataError: no winners or no losers, or none for the same prompt; with counts and what to do.
    """
    found = Mined()
    for prompt in store.prompts():
        sides: dict[str, list[int]] = {"winner": [], "loser": []}
        for sample in store.samples(prompt.prompt_id):
            try:
                side = classify(*_value(read_score(sample), score, threshold))
                if model is not None and (made_by := sample.read_header().model) != model:
                    raise DataError(f"made by {made_by}, not by {model}")
                if side is not None:
                    sample.read_latents()
                    store.read_text(prompt.prompt_id)
            except DataError as error:
                found.unusable.append((sample.name, str(error)))
                continue
            if side is None:
                found.invalid += 1
            else:
                sides[side].append(sample.seed)
        winners, losers = tuple(sides["winner"]), tuple(sides["loser"])
        found.winners, found.losers = found.winners + len(winners), found.losers + len(losers)
        if winners and losers:
            found.prompts.append(PromptPairs(prompt.prompt_id, winners, losers))
        elif winners or losers:
            found.only_winners += bool(winners)
            found.only_losers += bool(losers)
    if not found.prompts:
        raise DataError(_nothing_found(store, found))
    return found


def _value(score: DsrScore, which: str, threshold: float | None) -> tuple[float | None, float]:
    """Score and threshold that decide about a clip."""
    if which == "official":
        return score.score, WINNER_THRESHOLD if threshold is None else threshold
    if score.robust is None:
        raise DataError("its score.json has no robust score; run training.score --again true")
    return score.robust.score, score.robust.threshold if threshold is None else threshold


def _nothing_found(store: Store, found: Mined) -> str:
    counts = (
        f"{found.winners} winners, {found.losers} losers, {found.invalid} INVALID and {len(found.unusable)} unusable "
        f"clips in {store.root}"
    )
    if not (found.winners or found.losers or found.invalid):
        first = f" (the first, {found.unusable[0][0]}: {found.unusable[0][1]})" if found.unusable else ""
        return f"no clip can be used: {counts}{first}; run training.generate and training.score first"
    if not found.winners:
        return f"no winners: {counts}; generate more seeds per prompt, or lower --threshold"
    if not found.losers:
        return f"no losers: {counts}; the model already obeys these prompts: use harder ones, or raise --threshold"
    return f"no prompt has both a winner and a loser: {counts}; generate more seeds per prompt"


def run(args: Mine) -> Mined:
    """Mine and write the manifest."""
    if args.threshold is not None and not -1 < args.threshold <= 1:
        raise ConfigError(f"threshold must be in (-1, 1], found {args.threshold}")
    store = Store(args.store)
    found = mine(store, args.score, args.threshold, args.model)
    rule = {"score": args.score, "threshold": args.threshold, "model": args.model}
    path = args.out or args.store / "pairs.json"
    write_json(path, manifest(found.prompts, {**rule, **found.statistics()}))
    stage_log(store.root, "mine").write({"event": "end", **rule, **found.statistics()})
    print(f"{found.text()}\n{path}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.mine``."""
    command(Mine, run, argv)


if __name__ == "__main__":
    main()
