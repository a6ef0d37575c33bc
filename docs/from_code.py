"""Sphinx directives that write the reference from the code: keys of a spec, columns, verbs, exit codes, files.

Each directive makes Markdown and lets MyST read it, so headings and links of the result are checked like those of a
page. A column or a kind of failure that has no sentence here fails the build.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from docutils import nodes
from docutils.statemachine import StringList
from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from scaling_ray import errors
from scaling_ray.cli import build_parser
from scaling_ray.records import FailureClass
from scaling_ray.resources import NodePrice, PricesSpec
from scaling_ray.results import sweep_files
from scaling_ray.results.columns import COLUMNS, FOREIGN, Column
from scaling_ray.rules import TrunkRules
from scaling_ray.shards import format as shard_format
from scaling_ray.sizes import LADDER, parameters
from scaling_ray.spec import Fractions
from scaling_ray.specs import about_example, example_names
from scaling_ray.specs.annotated import ABOUT_KEYS, ABOUT_TABLES, EXAMPLES, TABLES

ABOUT_COLUMNS = {
    "run_id": "name of the run and the hash of its identity",
    "role": "`law`: a point of the law; `rate`: it only chose a learning rate",
    "status": "how the run stands",
    "failure": "class of its last failure, of a run that failed",
    "size": "name of the size",
    "width": "width of the network",
    "layers": "layers",
    "heads": "attention heads",
    "feedforward": "width of the feed-forward part",
    "params": "all parameters, the gene embedding among them",
    "params_without_embedding": "parameters that do not grow with the panel",
    "genes": "genes of the panel (V)",
    "cells": "training cells (D), resolved: where the spec says `all`, their number",
    "cells_requested": "training cells as the spec says it",
    "donors": "donors that the training cells come from",
    "seed": "which repeat",
    "lr": "learning rate at its highest",
    "lr_at_edge": "the chosen rate was the lowest or highest of those tried",
    "lr_check_ratio": "how far the transferred rate is from the best that the checking size found",
    "recipe": "how counts became values",
    "umi_fraction": "molecules that the network saw",
    "held_out_in_training": "validation and test cells were trained on",
    "objective": "what was minimised",
    "schedule": "of the learning rate",
    "max_cells_seen": "budget",
    "cells_seen": "training that was done",
    "masked_genes_seen": "predictions that training was on",
    "optimizer_steps": "updates that were done",
    "flops": "of matrix products in training, exact from shape and cells seen",
    "wall_seconds": "time from the start of the attempt that finished it to its result",
    "loss_unit": "what losses are measured in",
    "val_loss": "on validation cells, at the checkpoint that was chosen",
    "final_val_loss": "on validation cells, at the end of training",
    "test_loss": "on test cells, at the checkpoint that was chosen",
    "best_cells_seen": "cells seen at the checkpoint that was chosen",
    "stop_reason": "why training ended",
    "undertrained": "twice the cells seen still brought a fiftieth or more of all it gained",
    "baseline_loss": "of the gene mean, on the same test cells and masks",
    "gaussian_loss": "of the shrunk Gaussian, on the same test cells and masks",
    "attainable_loss": "of the best predictor that sees what the network sees; planted cells only",
    "bound_loss": "of a predictor that is told the donor's hidden effect; planted cells only",
    "attainable_bits": "the attainable loss as bits of counts",
    "bound_bits": "the bound as bits of counts",
    "bound_z": "distance of the run from the bound, pair by pair; far below 0 is a leak",
    "test_per_gene_bits": "test loss as bits, each gene with a variance of its own",
    "baseline_per_gene_bits": "gene mean as bits, each gene with a variance of its own",
    "precision": "of matrix products",
    "stacked": "models that trained as one with it",
    "attempts": "attempts that were begun",
    "mlflow_run_id": "its run in MLflow",
    "data_hash": "contents and rules of the shards",
    "workers": "processes that trained it at its end",
    "worker_counts": "processes that trained it, in order, where it was a group: 4 8 4",
    "engine": "what carried out updates",
}
"""Column of results.parquet -> what it is."""

ROLES = {
    "identity": "what it is",
    "axis": "axis",
    "protocol": "rule of training",
    "execution": "how it was carried out",
    "state": "state",
    "count": "count",
    "loss": "loss",
    "reference": "baseline",
    "note": "note",
}
"""Role of a column -> the same in words."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return ["", *("| " + " | ".join(line) + " |" for line in lines), ""]


def code(value: Any) -> str:
    """A value in the font of code, or nothing."""
    return f"`{value}`" if value not in ("", None) else ""


def prose(thing: Any) -> list[str]:
    """The docstring of something, as paragraphs."""
    return ["", *inspect.cleandoc(thing.__doc__ or "").splitlines(), ""]


def said_type(schema: dict[str, Any]) -> str:
    """What may stand for a key, in words, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(said_type(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "table")
    if kind == "array":
        return f"list of: {said_type(schema['items'])}"
    if kind == "object":
        names = schema.get("propertyNames", {}).get("enum")
        inner = schema["additionalProperties"]
        held = said_type(inner) if isinstance(inner, dict) else "anything"
        return f"table {'name' if names is None else 'of ' + ', '.join(map(code, names))} -> {held}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    shape = f" of the form `{schema['pattern']}`" if "pattern" in schema else ""
    return " ".join([words.get(kind, "table"), ", ".join(limits)]).strip() + shape


def keys_of(model: type[BaseModel], about: dict[str, str] | None, where: str) -> list[str]:
    """A table of the keys of one model: what may stand there, the default, what it is."""
    schema = model.model_json_schema()
    rows = []
    for key in about if about is not None else model.model_fields:
        field = model.model_fields[key]
        given = schema["properties"][key]
        kind = "table, below" if "$ref" in given else said_type(given)
        default = None if field.is_required() else field.get_default()
        default = default.model_dump() if isinstance(default, BaseModel) else default
        told = "must be given" if field.is_required() else "left out" if default is None else code(json.dumps(default))
        example = f"; such as `{json.dumps(EXAMPLES[f'{where}.{key}'])}`" if f"{where}.{key}" in EXAMPLES else ""
        said = (about[key] if about is not None else "") + example
        rows.append([code(key), kind, told, said])
    head = ["key", "what may stand there", "default", "what it is, with its unit"]
    return table(head if about is not None else head[:3], rows if about is not None else [row[:3] for row in rows])


def spec_keys() -> Iterator[str]:
    """Every table of a spec, then the tables within tables."""
    for name, model in TABLES.items():
        yield from ["", f"## `[{name}]`", "", ABOUT_TABLES[name], *keys_of(model, ABOUT_KEYS[name], name)]
        yield from ["In full:", *prose(model)]
        inner: dict[str, type[BaseModel]] = {"data": Fractions, "train": TrunkRules}
        if name in inner:
            yield from ["", f"### `[{name}.{'fractions' if name == 'data' else 'trunk'}]`", *prose(inner[name])]
            yield from keys_of(inner[name], None, name)
    yield from ["", "## `[prices]`", *prose(PricesSpec), *keys_of(PricesSpec, None, "prices")]
    yield from ["", "### `[prices.nodes.NAME]`", *prose(NodePrice), *keys_of(NodePrice, None, "prices.nodes")]


def sizes() -> Iterator[str]:
    """The named sizes with their parameters."""
    panels = (128, 512, 1024)
    yield from table(
        ["size", "width", "layers", "heads", "feed-forward", *(f"parameters at {genes:,} genes" for genes in panels)],
        (
            [
                code(name),
                *(str(n) for n in (shape.width, shape.layers, shape.heads, shape.feedforward)),
                *(f"{parameters(shape, genes):,}" for genes in panels),
            ]
            for name, shape in LADDER.items()
        ),
    )


def examples() -> Iterator[str]:
    """The shipped specs, each with the first line of its file."""
    yield from table(["spec", "what it is"], ([code(name), about_example(name)] for name in example_names()))


def _agrees(column: Column) -> str:
    return {"": "", "within_law": "all runs of a law", "by_size": "runs of a size and D"}[column.agrees]


def result_columns() -> Iterator[str]:
    """The columns of results.parquet."""
    yield from table(
        ["column", "type", "unit", "what it is", "kind", "must agree in"],
        ([code(c.name), code(c.type), c.unit, ABOUT_COLUMNS[c.name], ROLES[c.role], _agrees(c)] for c in COLUMNS),
    )


def foreign_columns() -> Iterator[str]:
    """The names under which a fit finds a column in other people's tables."""
    yield from table(
        ["column", "also found as"],
        ([code(c.name), ", ".join(map(code, c.aliases))] for c in (*FOREIGN, *COLUMNS) if c.aliases),
    )


def exit_codes() -> Iterator[str]:
    """Exit codes and what they mean, with the errors that a program meets behind each."""
    found = {number: [meaning] for number, meaning in errors.EXIT_CODES.items()}
    for error in vars(errors).values():
        if inspect.isclass(error) and issubclass(error, errors.ScalingRayError) and error is not errors.ScalingRayError:
            line = " ".join(inspect.cleandoc(error.__doc__ or "").split("\n\n")[0].split())
            found[error.exit_code].append(f"{code(error.__name__)}: {line}")
    yield from table(["code", "when"], ([str(number), "<br>".join(found[number])] for number in sorted(found)))


def failures() -> Iterator[str]:
    """The classes of failures that a run may be recorded with."""
    yield from ["", ", ".join(map(code, get_args(FailureClass))), ""]


def _arguments(parser: argparse.ArgumentParser) -> Iterator[list[str]]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices is not None else None
        value = "" if action.nargs == 0 else f" {choices or shown}"
        name = f"`{', '.join(action.option_strings)}{value}`" if action.option_strings else f"`{choices or shown}`"
        nothing = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        needed = "must be given" if action.required and action.option_strings else ""
        yield [name, needed if nothing else code(action.default), (action.help or "").replace("%%", "%")]


def verbs() -> Iterator[str]:
    """Every verb with its arguments, from the parser that the command line uses."""

    def walk(parser: argparse.ArgumentParser) -> Iterator[str]:
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not inner:
            needs = parser.get_default("needs")
            about = (parser.description or "").removesuffix(".")
            yield from ["", f"## `{parser.prog}`", "", f"{about[:1].upper()}{about[1:]}.", ""]
            if needs:
                yield f"Needs `pip install 'scaling-ray[{','.join(needs)}]'`."
            yield from table(["argument", "default", "what it is"], _arguments(parser))
            if parser.epilog:
                yield from ["", "```text", *parser.epilog.splitlines(), "```", ""]
            return
        for name, child in inner[0].choices.items():
            if child.prog.split()[-1] == name:
                yield from walk(child)

    yield from walk(build_parser())


def sweep_directory() -> Iterator[str]:
    """The files below SWEEP_DIR and of one run, as their module lists them."""
    first, _, listed = inspect.cleandoc(sweep_files.__doc__ or "").partition("\n\n")
    yield from ["", first, "", "```text", *listed.splitlines(), "```", "", *prose(sweep_files.RunFiles)]


def shard_directory() -> Iterator[str]:
    """The files of shards, as their module says it."""
    yield from prose(shard_format)


DIRECTIVES = {
    "spec-keys": spec_keys,
    "sizes": sizes,
    "examples": examples,
    "result-columns": result_columns,
    "foreign-columns": foreign_columns,
    "exit-codes": exit_codes,
    "failures": failures,
    "verbs": verbs,
    "sweep-directory": sweep_directory,
    "shard-directory": shard_directory,
}
"""Name of a directive -> the Markdown that it stands for."""


class FromCode(SphinxDirective):
    """Reads the Markdown of the function that its name stands for, as though the page held it."""

    def run(self) -> list[nodes.Node]:
        """The parsed nodes."""
        lines = list(DIRECTIVES[self.name]())
        holder = nodes.section()
        holder.document = self.state.document
        self.state.nested_parse(StringList(lines, source=self.env.docname), 0, holder, match_titles=True)
        return holder.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Make the directives known to Sphinx."""
    for name in DIRECTIVES:
        app.add_directive(name, FromCode)
    return {"version": "1", "parallel_read_safe": True}
