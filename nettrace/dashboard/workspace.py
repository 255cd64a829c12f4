"""A W&B workspace that shows what the callbacks log: built here, saved by W&B's own package."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nettrace.dashboard.pairs import AGAINST, FLATNESS, PORTRAITS
from nettrace.measures import Measure
from nettrace.record import ERROR

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

#: Over what our curves are drawn, as the callbacks define it: updates that the weights have had.
STEP = "nettrace/step"
#: What transformers' own W&B callback puts before each name, and over what it draws all curves.
TRAINER = "train/"
TRAINER_STEP = "train/global_step"
#: What is logged beside measures, with what it is.
ABOUT = {
    "nettrace/seconds": "wall time of a measurement (s)",
    "nettrace/step_seconds": "wall time of measuring a training step (s)",
    "nettrace/share": "time spent measuring over wall time",
    "nettrace/skipped": "steps left out to stay within budget=",
    "nettrace/spot_check": "largest difference from plain autograd",
    "nettrace/step_spot_check": "largest difference from plain autograd",
    "nettrace/step_outputs_spot_check": "largest difference from plain autograd",
    "nettrace/spot_check_of_pairs": "largest difference from plain autograd",
}
_LABELLED_ABOUT = {
    "nettrace/seconds_per_measure": "wall time of each measure (s)",
    "nettrace/step_seconds_per_measure": "wall time of each measure (s)",
}
#: Axes whose places have names: each is a curve of its own, "group/quantity/label".
_LABELLED = ("layer", "nodes", "representation")
#: Those of `nettrace.landscape` that give numbers, as "landscape/function/number".
_PROBES = ("learning_coefficient", "langevin", "loss_density")
#: Of which of their results there are figures first.
_SEEN = ("slice_1d/loss", "slice_2d/loss", "barrier/loss", "loss_density/entropy")
#: Where figures are logged, and the table of final values.
FIGURES = "figures/"
FINAL = "nettrace/final_values"
#: Groups that are seen first; others follow by name.
_FIRST = ("loss", "ntk", "fisher", "hessian", "gradients", "weights")
_WIDE = 60


def workspace(
    entity: str,
    project: str,
    measures: Sequence[Measure],
    *,
    name: str = "nettrace",
    prefix: str = "",
    probes: Sequence[str] = (),
    of_trainer: bool = False,
) -> Workspace:
    """The workspace of a project, not saved yet; no network is needed.

    It has a section for each group of measures. A number is a line plot with its standard error;
    what has a number for each layer is one with a line each. Figures of arrays are in media
    panels, final values in a table; conventions and sources stand in a panel at the section's end.

    Args:
        entity: the W&B user or team.
        project: its project.
        measures: what is shown.
        name: what the workspace is called.
        prefix: as given to the callbacks.
        probes: the names of several probes, as given to the callbacks.
        of_trainer: whether transformers' Trainer logs, rather than Lightning: it puts "train/"
            before names, draws over its own step, and gets neither arrays nor figures.

    Raises:
        ImportError: if wandb-workspaces is missing.
        ValueError: if a name has no letters in it.
    """
    ws, wr = packages()
    for what, given in (("entity", entity), ("project", project), ("name", name)):
        if not given.strip() or "/" in given:
            raise ValueError(f"expected a name for the {what} of the workspace, got {given!r}")
    names = _Names(TRAINER + prefix if of_trainer else prefix, probes)
    step = TRAINER_STEP if of_trainer else STEP
    groups: dict[str, list[Measure]] = {}
    for measure in sorted(measures, key=lambda one: one.name):
        groups.setdefault(measure.name.partition("/")[0], []).append(measure)
    sections = []
    for group in sorted(groups, key=lambda one: (_rank(one), one)):
        panels = [
            _plot(wr, names, name, m.convention, step)
            for m in groups[group]
            if not m.dims
            for name in ([m.name] if m.is_own else [m.name, f"{m.name}.re", f"{m.name}.im"])
        ]
        arrays = [m for m in groups[group] if m.dims]
        if not of_trainer:
            panels += [
                _lines(wr, names, m.name, m.convention, step)
                for m in arrays
                if m.dims in [(axis,) for axis in _LABELLED]
            ]
            keys = [key for m in arrays for key in names.figures(m.name)]
            keys += [
                names.prefix + FIGURES + pair for pair in _pairs(groups) if pair.startswith(group)
            ]
            if keys:
                panels.append(wr.MediaBrowser(title=f"{group}: figures", media_keys=keys))
        panels.append(wr.MarkdownPanel(markdown=_conventions(groups[group])))
        sections.append(ws.Section(name=group, panels=panels, is_open=group in _FIRST[:2]))
    if not of_trainer:
        plain = _Names("", ())  # as that callback has no prefix
        lines = [
            _lines(wr, plain, f"landscape/{one}", "numbers of a probe", step) for one in _PROBES
        ]
        keys = [f"{FIGURES}landscape/{one}" for one in _SEEN]
        media = wr.MediaBrowser(title="landscape: figures", media_keys=keys)
        sections.append(ws.Section(name="landscape", panels=[*lines, media]))
    about = [_plot(wr, names, name, text, step) for name, text in ABOUT.items()]
    if not of_trainer:
        about += [_lines(wr, names, n, text, step) for n, text in _LABELLED_ABOUT.items()]
        regex = f"^{re.escape(names.prefix)}.+_backward_[0-9]+({ERROR})?$"
        later = "second and later backward passes of a batch"
        about.append(_drawn(wr, later, "as of the first", step, metric_regex=regex))
        about.append(wr.WeavePanelSummaryTable(table_name=names.prefix + FINAL))
    sections.append(ws.Section(name="nettrace", panels=about))
    found: Workspace = ws.Workspace(entity=entity, project=project, name=name, sections=sections)
    return found


def specification(found: Workspace) -> str:
    """What is sent to W&B when a workspace is saved, as JSON."""
    return str(found._to_model().model_dump_json(by_alias=True, exclude_none=True))


def packages() -> tuple[Any, Any]:
    """W&B's modules of workspaces and of panels.

    Raises:
        ImportError: if its package is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on its own use of pydantic
            import wandb_workspaces.reports.v2 as wr
            import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ImportError(
            "workspaces need wandb-workspaces: pip install 'nettrace[workspace]'"
        ) from error
    return ws, wr


class _Names:
    """Under which names something is logged."""

    def __init__(self, prefix: str, probes: Iterable[str]) -> None:
        self.prefix = prefix
        self.probes = [f"/{probe}" for probe in probes] or [""]

    def numbers(self, name: str) -> list[str]:
        """Of a number: its own, and of an estimate that of its standard error."""
        return [f"{self.prefix}{name}{p}{e}" for p in self._of(name) for e in ("", ERROR)]

    def labels(self, name: str) -> str:
        """Of what has a number for each label, as a regular expression."""
        return f"^{re.escape(self.prefix + name)}/.+"

    def figures(self, name: str) -> list[str]:
        """Of the figures of an array."""
        return [f"{self.prefix}{FIGURES}{name}{probe}" for probe in self.probes]

    def _of(self, name: str) -> list[str]:
        return [""] if name in ABOUT and "spot_check" not in name else self.probes


def _plot(wr: Any, names: _Names, name: str, about: str, step: str) -> Any:
    return _drawn(wr, name, about, step, y=names.numbers(name))


def _lines(wr: Any, names: _Names, name: str, about: str, step: str) -> Any:
    return _drawn(wr, name, about, step, metric_regex=names.labels(name))


def _drawn(wr: Any, name: str, about: str, step: str, **curves: Any) -> Any:
    text = textwrap.shorten(about, _WIDE, placeholder=" ...")
    return wr.LinePlot(title=name, x=step, title_x="optimizer step", title_y=text, **curves)


def _pairs(groups: Mapping[str, Sequence[Measure]]) -> list[str]:
    """What is seen against each other of that which is measured, of a single probe."""
    measured = {measure.name for several in groups.values() for measure in several}
    pairs = [f"{y}{AGAINST}{x}" for x, y in PORTRAITS] + [FLATNESS]
    return [pair for pair in pairs if set(pair.split(AGAINST)) <= measured]


def _rank(group: str) -> int:
    return _FIRST.index(group) if group in _FIRST else len(_FIRST)


def _conventions(measures: Sequence[Measure]) -> str:
    """What measures are, by which convention, and where that is from."""
    found = ["**What is measured**"]
    for one in measures:
        convention = "" if one.convention == one.summary else one.convention
        parts = (one.summary, convention, one.source and f"Source: {one.source}")
        text = " ".join(part.rstrip(".") + "." for part in parts if part)
        found.append(f"- `{one.name}`: {text}")
    return "\n".join(found)
