"""Names of other people's columns: which declared column a header means, and in which unit its numbers are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scaling_ray.results.fields import multiple_of

_COUNTED = frozenset(("params", "params_without_embedding", "cells", "cells_seen", "flops", "max_cells_seen"))
_PREFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21}
_NO_UNIT = frozenset(
    ("nats", "nat", "bits", "bit", "count", "number", "total", "mse", "params", "parameters", "tokens")
)
_NO_UNIT |= frozenset(("cells", "flop", "flops", "nats_token", "nats_per_token", "bits_per_byte"))
_TRAINING = frozenset(("train", "training"))
_LOSS_WORDS = frozenset(("loss", "losses", "nll", "bpb", "bpc", "mse", "entropy", "ppl", "perplexity"))
_PERPLEXITY = frozenset(("ppl", "perplexity"))
_OUTCOMES = _LOSS_WORDS | frozenset(
    "best mae rmse acc accuracy error err auc f1 bleu rouge score r2 reward time runtime seconds secs hours minutes "
    "duration timestamp date created started finished ended updated wall throughput memory mem mfu hfu cost energy "
    "host hostname user notes note comment comments url link color colour commit".split()
)
_NORMS = re.compile(r"(grad|gradient|param|weight|update)s?_norm")
_OF_A_RUN = (
    *("run_id", "run_uuid", "run", "run_name", "runname", "runid", "id", "uuid", "name", "display_name"),
    *("exp_name", "exp_id", "exp", "experiment_name", "experiment_id", "experiment"),
    *("trial_id", "trial_name", "trial", "job_id"),
)
_OF_A_SIZE = ("model", "model_name", "size_name", "name", "model_id")


@dataclass(frozen=True)
class Header:
    """One header: its plain name, in lower case with one underscore for anything else, and what its unit multiplies.

    ``whole`` is the plain name with the unit in it; ``parts`` are the plain names of what stands between slashes and
    dots, as in "eval/loss" and "optimizer.learning_rate".
    """

    text: str
    whole: str
    plain: str
    scale: float
    parts: tuple[str, ...]

    @property
    def words(self) -> frozenset[str]:
        """The words of its name."""
        return frozenset(self.whole.split("_"))

    @property
    def of_training(self) -> bool:
        """Whether it names something measured on training data."""
        return bool(self.words & _TRAINING)

    @property
    def is_loss(self) -> bool:
        """Whether it names a loss, or its exponential."""
        return bool(self.words & _LOSS_WORDS)

    @property
    def is_perplexity(self) -> bool:
        """Whether it names the exponential of a loss."""
        return bool(self.words & _PERPLEXITY)

    @property
    def is_outcome(self) -> bool:
        """Whether it names what came out of a run (a score, a time), which differs between repeats."""
        return bool(self.words & _OUTCOMES or _NORMS.search(self.whole) or "per_second" in self.whole)

    @property
    def is_seed(self) -> bool:
        """Whether it names a seed beside the one that is read."""
        return "seed" in self.words

    @property
    def may_name_runs(self) -> bool:
        """Whether it may hold a name for each run."""
        return self.plain in _OF_A_RUN or self.parts[-1] in _OF_A_RUN

    @property
    def may_name_sizes(self) -> bool:
        """Whether it may hold a name for each size of model."""
        return self.plain in _OF_A_SIZE


def plain_name(text: str) -> str:
    """Lower case, one underscore for anything that is no letter or digit: "Model Size" is ``model_size``."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def read_header(text: str, counted: Iterable[str]) -> Header:
    """A header with its unit taken off, where it says one that multiplies.

    Args:
        text: as it stands in the table: "params (M)", "tokens_billions", "total_gflops".
        counted: plain names of columns that are counts, for which a unit may stand without brackets.
    """
    whole = plain_name(text)
    *before, last = (part for part in re.split(r"[/.:]", text) if plain_name(part)) if whole else ("",)
    plain, scale = _without_unit(last, frozenset(counted))
    parts = (*map(plain_name, before), plain)
    return Header(text, whole, "_".join(parts), scale, parts)


def _without_unit(text: str, counts: frozenset[str]) -> tuple[str, float]:
    """A plain name without its unit, and what the unit multiplies by."""
    bracket = re.fullmatch(r"(.*?)[\s_]*[(\[{]([^()\[\]{}]*)[)\]}]\s*", text)
    if bracket:
        unit = multiple_of(bracket[2]) or _flops_scale(bracket[2])
        if unit or plain_name(bracket[2]) in _NO_UNIT:
            return plain_name(bracket[1]), unit or 1.0
    plain = plain_name(text)
    tail = re.fullmatch(r"(.+?)_(?:in_)?([a-z]+|1e\d+)", plain)
    if tail and tail[1] in counts and plain not in counts and (unit := multiple_of(tail[2])):
        return tail[1], unit
    if tail and tail[1].split("_")[-1] in ("total", "training", "train") and (unit := _flops_scale(tail[2])):
        return f"{tail[1]}_flops", unit
    return plain, 1.0


def _flops_scale(unit: str) -> float | None:
    """What "GFLOPs", "ZFLOP" or "EF" multiply by."""
    found = re.fullmatch(r"([kmgtpez])flops?", unit.strip().lower())
    return _PREFIXES[found[1]] if found else None


def counts_of(names: Iterable[tuple[str, Sequence[str]]]) -> frozenset[str]:
    """Names and aliases of the declared columns that count something."""
    return frozenset(each for name, aliases in names if name in _COUNTED for each in (name, *aliases) if len(each) > 1)


def matching(name: str, headers: Sequence[Header], *, measured: bool = False) -> list[Header]:
    """The headers that mean a declared name, those that say it most exactly; several where the table has several.

    Args:
        name: a declared name or an alias of it.
        headers: of the table.
        measured: whether it is a loss, which what is measured in training never stands for.
    """
    exact = [header for header in headers if header.text == name]
    plain = [header for header in headers if header.whole == name]
    scaled = [header for header in headers if header.plain == name]
    camel = [header for header in headers if plain_name(_uncamel(header.text)) == name]
    parts = [
        header
        for header in headers
        if len(name) > 1
        and any("_".join(header.parts[first:]) == name for first in range(1, len(header.parts)))
        and not (measured and header.of_training)
    ]
    return exact or plain or scaled or camel or parts


def _uncamel(text: str) -> str:
    """The words of "numParams" apart."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)
