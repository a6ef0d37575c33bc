"""The shapes a law may take: a sum of terms ``coefficient * axis ** -exponent``, every coefficient >= 0.

A term with an axis and no exponent is ``coefficient * log(largest axis / axis)``, so that its law reads from the
largest value down and stays a sum of non-negative terms. The law that breaks is not such a sum: see ``elbow.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

# The exponents are searched here and nowhere else; an estimate on the edge of a search is no estimate.
EXPONENT_SEARCH = (0.01, 3.0)


@dataclass(frozen=True)
class Term:
    """``coefficient * axis ** -exponent``; with no ``axis`` a floor; with no ``exponent`` a logarithm of the axis."""

    coefficient: str
    axis: str | None = None
    exponent: str | None = None


@dataclass(frozen=True)
class Form:
    """One law: its terms and how a reader should see it written."""

    name: str
    formula: str
    terms: tuple[Term, ...]

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponents, in the order of the terms that own them."""
        return tuple(term.exponent for term in self.terms if term.exponent is not None)

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the non-negative coefficients, one per term."""
        return tuple(term.coefficient for term in self.terms)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Every free parameter: exponents first."""
        return self.exponents + self.coefficients

    @property
    def axes(self) -> tuple[str, ...]:
        """The columns of a table that this law reads beside the loss."""
        return tuple(term.axis for term in self.terms if term.axis is not None)

    @property
    def floor(self) -> str | None:
        """Name of the loss that no size and no data can buy away, where the form has one."""
        return next((term.coefficient for term in self.terms if term.axis is None), None)

    def axis_of(self, exponent: str) -> str:
        """The axis that ``exponent`` belongs to."""
        return next(term.axis for term in self.terms if term.exponent == exponent and term.axis is not None)

    def loss_at(self, parameters: Mapping[str, float], place: Mapping[str, float]) -> float:
        """The law's loss at one place (axis -> value), for a form without logarithms."""
        loss = 0.0 if self.floor is None else parameters[self.floor]
        for term in reversed(self.terms):
            if term.axis is not None and term.exponent is not None:
                loss += parameters[term.coefficient] * place[term.axis] ** -parameters[term.exponent]
        return loss


CONSTANT = Form("constant", "L = c", (Term("c"),))
POWER = Form("power", "L = a P^-alpha", (Term("a", "params", "alpha"),))
POWER_FLOOR = Form("power_floor", "L = a P^-alpha + c", (Term("c"), Term("a", "params", "alpha")))
PARAMS_CELLS = Form(
    "params_cells",
    "L = E + a / P^alpha + b / D^beta",
    (Term("E"), Term("a", "params", "alpha"), Term("b", "cells", "beta")),
)
CELLS_FLOOR = Form("cells_floor", "L = b D^-beta + c", (Term("c"), Term("b", "cells", "beta")))
CELLS_LOG = Form("cells_log", "L = k + b log(D_max / D)", (Term("k"), Term("b", "cells")))


def in_axis(form: Form, axis: str, symbol: str) -> Form:
    """A form of P on another axis, for example exact FLOPs: ``power_floor`` becomes ``power_floor_flops``."""
    terms = tuple(term if term.axis is None else replace(term, axis=axis) for term in form.terms)
    return Form(f"{form.name}_{axis}", form.formula.replace("P^", f"{symbol}^"), terms)


POWER_FLOPS, POWER_FLOOR_FLOPS = in_axis(POWER, "flops", "C"), in_axis(POWER_FLOOR, "flops", "C")
