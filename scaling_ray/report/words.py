"""The words of the page, explained on the page: every term leads to its entry there (``docs/glossary.md`` has more)."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_TEXT = """
verdict: What the runs support. Supported: a law describes them within their noise. Approximate: within a misfit that
  is stated and that widens every interval; good for planning, no constant of nature. Refused: they leave it open, and
  no number is given. Size, data and predictions have one each.
interval: 95%, and as wide as the larger of the noise between runs and the misfit of the law makes it; it also holds
  the fits that leave out one size (or one number of cells), each as far as misfit and not noise moved it. Conditional
  on this split: the held-out groups, genes and masks stay as they are.
statistical interval: What the noise between runs alone would leave open: a 95% F-profile. It is too narrow wherever
  no law fits exactly.
loss: Mean of the objective over masked genes, here on test cells of the checkpoint that validation chose.
size: A shape of the network with its name. P counts all its trainable parameters, the gene embedding included.
D: Unique training cells. Every smaller D is a part of the larger ones.
T: Cells seen in training, each presentation counted; epochs are T / D.
V: Genes of the panel, best ranked first on training cells. Losses of different V are different losses.
seed: One repeat of a setting: other first weights, other D cells, another order.
setting: One point of the grid: a size with a number of genes and cells. Its seeds are repeats.
alpha: Exponent of size: the loss above the floor falls as P to the minus alpha. At 0.3 ten times the parameters halve
  it.
beta: Exponent of data: the same for D.
floor: In a law (c or E) the loss that no size would go below. Planted: the best loss that these cells allow.
gene mean: The guess that every gene has its mean over training cells: what a model must beat to have learned
  anything.
shrunk Gaussian: The best linear guess of a masked gene from the visible ones, by a shrunken covariance of the same
  training cells. A model beyond it knows something that no covariance holds.
share of the way: 0 at the gene mean, 1 at the shrunk Gaussian (or at the planted floor, where that is said).
contrast: Difference of mean losses between two sizes at the same cells (or two D at the same sizes). Its intervals
  hold all at once and need no law.
prediction: Mean loss of new runs at a place that was not trained, by the law and by every rival that fits as well.
  Given where the largest size, held out, was predicted within its own interval.
held out: Predicted by a fit that never saw it.
rival: A law without a power that may fit as well: a logarithm, an exponential approach, a law that stops falling.
leave one out: The same fit without one size or one number of cells.
declared choices: Ways to fit that could equally be defended. Their spread is part of the answer.
undertrained: The validation loss still fell when the budget ended.
anchor size: A size that is shown beside the law and is no point of it. XXS, of width 1, is the gene mean.
leak: Knowledge of test cells in training. On planted cells a loss below the bound, compared pair by pair, shows one.
bits: A loss as information under the likelihood named beside it.
rate: The learning rate.
recipe: How counts become values and which genes are masked; losses of different recipes cannot be compared.
compute-optimal: The split of a budget between size and cells that the law gives the lowest loss.
isoFLOP: Settings of equal compute; the lowest of them needs no law.
"""


def _read(text: str) -> dict[str, str]:
    """Entries "word: meaning", the lines that continue one indented."""
    joined = text.strip().replace("\n  ", " ")
    return dict(line.split(": ", 1) for line in joined.splitlines())


WORDS = _read(_TEXT)
"""Each word and what it means."""


def anchor(word: str) -> str:
    """The id of a word's entry on the page."""
    return "word-" + re.sub(r"[^a-z0-9]+", "-", word.lower())


def term(word: str, shown: str | None = None) -> Markup:
    """A word as a link to its entry; KeyError for one that the page does not explain."""
    if word not in WORDS:
        raise KeyError(word)
    return Markup('<a class="term" href="#{}">{}</a>').format(anchor(word), escape(shown or word))
