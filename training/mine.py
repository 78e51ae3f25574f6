"""Sort the scored clips of a store into winners and losers: ``python -m training.mine``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import write_json
from spatialalign.score import DsrScore
from spatialalign.store import WINNER_THRESHOLD, classify
from training.cli import command
from training.labels import LabelTable, read_table
from training.pair_rules import Judged, Rule, agreement, choose
from training.pairs import Key, PromptPairs, Scores, manifest
from training.stages import stage_log
from training.store import Sample, Store


@dataclass(frozen=True)
class Mine:
    """Find the prompts with at least one winner and one loser, and list their clips for training."""

    store: Path
    """Sample store with scores."""
    out: Path | None = None
    """Where the list goes; null for pairs.json in the store."""
    score: Literal["official", "robust"] = "official"
    """Which of the two scores decides, unless labels do."""
    threshold: float | None = None
    """A clip with at least this score wins, one below it loses; null for 0.7, the robust score's own threshold, or, of
    labels, their mean."""
    model: str | None = None
    """Only clips that this model made, by the name their files record; null for all."""
    rule: Rule = "threshold"
    """threshold; margin: a prompt's best clips against its worst, each at least --margin above; best-worst: the best
    one against the worst one."""
    margin: float = 0.0
    """Least difference between a winner and a loser, for the rules margin and best-worst."""
    labels: Path | None = None
    """File of training.label whose labels decide instead of the store's scores."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of its dimensions, as {"dsr": 1, "VQ": 1}; they are standardised first. Needed if there are several."""

    def __post_init__(self) -> None:
        known = self.labels is not None
        if self.threshold is not None and not known and not -1 < self.threshold <= 1:
            raise ConfigError(f"threshold must be in (-1, 1], found {self.threshold}")
        if self.threshold is not None and self.rule != "threshold":
            raise ConfigError(f"rule {self.rule} knows no threshold; leave threshold out, or use rule threshold")
        if not (0 < self.margin or (self.margin == 0 and self.rule != "margin")):
            raise ConfigError(f"margin must be above 0 for rule margin, and never below, found {self.margin}")
        if self.margin > 0 and self.rule == "threshold":
            raise ConfigError("rule threshold knows no margin; leave margin out, or use rule margin or best-worst")
        if known and self.score != "official":
            raise ConfigError(f"score {self.score} does not decide where labels do; leave one of them out")
        if self.weights and not known:
            raise ConfigError("weights are those of labels; give --labels, which training.label writes")


@dataclass
class Mined:
    """What was found: prompts for training, and what was left out, with reasons."""

    prompts: list[PromptPairs] = field(default_factory=list)
    winners: int = 0
    losers: int = 0
    invalid: int = 0
    only_winners: int = 0
    only_losers: int = 0
    too_close: int = 0
    unusable: list[tuple[str, str]] = field(default_factory=list)

    def statistics(self) -> dict[str, Any]:
        """Counts for the manifest.

        By the rule threshold, winners and losers are those of the whole store, by the others those in pairs.
        """
        return {
            "prompts_with_pairs": len(self.prompts),
            "prompts_with_winners_only": self.only_winners,
            "prompts_with_losers_only": self.only_losers,
            "prompts_too_close": self.too_close,
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
            f"only, {self.only_losers} losers only, {self.too_close} clips that differ too little)"
        ]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.unusable[:20]])


def mine(
    store: Store,
    score: Literal["official", "robust"] = "official",
    threshold: float | None = None,
    model: str | None = None,
    rule: Rule = "threshold",
    margin: float = 0.0,
    labels: Scores | None = None,
) -> Mined:
    """Judge every sample and sort each prompt's by a rule; keep prompts with at least one winner and one loser.

    The default is the paper's way (methods: official train.py). ``labels`` decide instead of the store's scores; a clip
    without one counts as INVALID. A sample without score, of another model than ``model``, or whose latents cannot be
    trained on, is left out with its reason.

    Raises:
        DataError: no winners or no losers, or none for the same prompt; with counts and what to do.
    """
    found = Mined()
    for prompt in store.prompts():
        clips: list[Judged] = []
        for sample in store.samples(prompt.prompt_id):
            try:
                clip = _judged(sample, score, threshold, labels)
                if model is not None and (made_by := sample.read_header().model) != model:
                    raise DataError(f"made by {made_by}, not by {model}")
                if clip is not None:
                    sample.read_latents()
                    store.read_text(prompt.prompt_id)
            except DataError as error:
                found.unusable.append((sample.name, str(error)))
                continue
            if clip is None:
                found.invalid += 1
            else:
                clips.append(clip)
        winners, losers = choose(clips, rule, margin)
        found.winners, found.losers = found.winners + len(winners), found.losers + len(losers)
        if winners and losers:
            found.prompts.append(PromptPairs(prompt.prompt_id, winners, losers))
        elif rule == "threshold":
            found.only_winners += bool(winners)
            found.only_losers += bool(losers)
        else:
            found.too_close += bool(clips)
    if not found.prompts:
        raise DataError(_nothing_found(store, found))
    return found


def _judged(sample: Sample, which: str, threshold: float | None, labels: Scores | None) -> Judged | None:
    """A clip with the score that decides about it; None for an INVALID clip, or one without a label."""
    if labels is not None:
        value = labels.get((sample.prompt_id, sample.seed))
        return None if value is None else Judged(sample.seed, value, threshold or 0.0)
    value, least = _value(sample.read_score(), which, threshold)
    return None if value is None or classify(value, least) is None else Judged(sample.seed, value, least)


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
    if found.too_close:
        return f"no prompt has clips that differ enough: {counts}; generate more seeds per prompt, or lower --margin"
    if not (found.winners or found.losers or found.invalid):
        first = f" (the first, {found.unusable[0][0]}: {found.unusable[0][1]})" if found.unusable else ""
        return f"no clip can be used: {counts}{first}; run training.generate and training.score first"
    if not found.winners:
        return f"no winners: {counts}; generate more seeds per prompt, or lower --threshold"
    if not found.losers:
        return f"no losers: {counts}; the model already obeys these prompts: use harder ones, or raise --threshold"
    return f"no prompt has both a winner and a loser: {counts}; generate more seeds per prompt"


def mixed_labels(table: LabelTable, weights: Mapping[str, float]) -> dict[Key, float]:
    """The labels that decide: those of the only dimension, or several mixed; standardised in either case.

    Raises:
        ConfigError: several dimensions and no weights.
    """
    if not weights and len(table.names) > 1:
        example = json.dumps(dict.fromkeys(table.names, 1))
        raise ConfigError(f"the labels have the dimensions {', '.join(table.names)}; give --weights, as '{example}'")
    return table.mixed(weights or {table.names[0]: 1.0})


def run(args: Mine) -> Mined:
    """Mine and write the manifest."""
    store = Store(args.store)
    rule: dict[str, Any] = {"score": args.score, "threshold": args.threshold, "model": args.model}
    rule |= {"rule": args.rule, "margin": args.margin}
    table = None if args.labels is None else read_table(args.labels)
    labels = None if table is None else mixed_labels(table, args.weights)
    found = mine(store, args.score, args.threshold, args.model, args.rule, args.margin, labels)
    if table is not None:
        shares = {name: agreement(found.prompts, table.column(name)) for name in table.names}  # None: not known
        rule |= {"score": "labels", "labels": str(args.labels), "weights": args.weights, "winner_is_better": shares}
    path = args.out or args.store / "pairs.json"
    write_json(path, manifest(found.prompts, {**rule, **found.statistics()}, labels))
    stage_log(store.root, "mine").write({"event": "end", **rule, **found.statistics()})
    print(found.text())
    for name, share in rule.get("winner_is_better", {}).items():
        if share is not None:
            print(f"  the winner has the better {name} in {100 * share:.1f} % of the pairs")
    print(path)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.mine``."""
    command(Mine, run, argv)


if __name__ == "__main__":
    main()
