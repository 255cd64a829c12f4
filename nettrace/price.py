"""What measures will cost on a network and probe, told before they are taken.

The price of each statistic is put together from a few pieces that are timed on the network (see
`nettrace.pieces`), and stands in `PRICES` under its name. What several measures need is paid for
once. A statistic without an entry is taken to cost what `trace` does: a backward pass an output,
and a number kept for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from nettrace.gradient_curvature import PARTS, PRODUCTS
from nettrace.jackknife import GROUPS
from nettrace.pieces import Pieces
from nettrace.statistics import Statistics


class TooDear(RuntimeError):
    """A measure is not taken, because it would take longer or more memory than it may.

    Args:
        what: the measure and its price.
        why: the limit, and what would do instead.
    """

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}, {why}")
        self.what = what
        self.why = why

    def __reduce__(self) -> tuple[type[TooDear], tuple[str, str]]:
        return type(self), (self.what, self.why)


@dataclass(frozen=True)
class Price:
    """What something costs.

    Args:
        seconds: wall time.
        bytes: of results that are kept, and of the largest temporary results beside them.
        passes: backward passes through the whole network.
    """

    seconds: float
    bytes: float
    passes: float

    def __str__(self) -> str:
        return f"{duration(self.seconds)} and {size(self.bytes)}"


@dataclass(frozen=True)
class Work:
    """What a statistic costs beside the statistics that it is made of.

    Args:
        seconds: wall time.
        passes: backward passes.
        kept: bytes of what stays.
        temporary: bytes that are needed meanwhile, as the budget allows.
        whole: bytes that are needed meanwhile, whatever the budget.
        of: the statistics that it is made of, priced by themselves.
        instead: what would do where this is too dear.
    """

    seconds: float = 0
    passes: float = 0
    kept: float = 0
    temporary: float = 0
    whole: float = 0
    of: tuple[str, ...] = ()
    instead: str = ""


Needs: TypeAlias = frozenset[str]
Rule: TypeAlias = Callable[[Pieces, Needs], Work]
#: By statistic, what it costs where all of `needs` are wanted; parts that several share have names
#: with an underscore.
PRICES: dict[str, Rule] = {}
_TRACES = frozenset({"trace", "layer_traces"})


def prices(*names: str) -> Callable[[Rule], Rule]:
    """Registers what statistics cost."""

    def register(rule: Rule) -> Rule:
        PRICES.update(dict.fromkeys(names, rule))
        return rule

    return register


def rows(pieces: Pieces, count: int, of: tuple[str, ...] = (), instead: str = "") -> Work:
    """Norms of so many combinations of each sample's outputs, by a backward pass each."""
    kept = pieces.samples * count * pieces.item
    seconds = pieces.norms(count)
    temporary = pieces.chunk(count) + pieces.norms_keep + pieces.written(1) + pieces.one_pass
    return Work(seconds, count, kept, temporary, of=("jacobian", *of), instead=instead)


@prices("model", "inputs", "parameters", "samples", "step", "targets", "outputs", "likelihood")
@prices("assumed_likelihood", "suggested_likelihood", "losses", "routes", "loss_check")
@prices("weights", "constants", "first_outputs")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work()  # the look's own, whose price stands by itself


@prices("jacobian")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(pieces.tape)


@prices("scores")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(pieces.scores, kept=pieces.samples * pieces.outputs * pieces.item)


@prices("fisher_metric")
def _(pieces: Pieces, needs: Needs) -> Work:
    size = pieces.samples * pieces.outputs**2 * pieces.item
    return Work(kept=size, whole=2 * size, instead="fisher/trace_mc draws targets")


@prices("mean_gradient_sqnorm")
def _(pieces: Pieces, needs: Needs) -> Work:
    size = 3 * pieces.parameter_bytes + pieces.one_pass
    return Work(pieces.vjp, 1, temporary=size, of=("jacobian", "scores"))


@prices("loss_gradient_sqnorms", "loss_gradient_column_sqnorms")
def _(pieces: Pieces, needs: Needs) -> Work:
    return rows(pieces, 1, ("scores",))


@prices("loss_gradients")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("jacobian", "scores"))


@prices("_gradient_products")
def _(pieces: Pieces, needs: Needs) -> Work:
    """By layer, the Gram matrix of the loss gradients; of many samples, products with the mean."""
    if pieces.samples > Statistics.most_pairs:
        found = rows(pieces, 3, ("loss_gradients",))
        return replace(found, seconds=found.seconds + pieces.vjp, passes=4)
    kept = pieces.layers * pieces.samples**2 * pieces.item
    seconds = pieces.pull + pieces.gram() / pieces.outputs**2
    fresh = pieces.pulled(1) + pieces.written(1) + pieces.one_pass
    instead = "take fewer samples"
    return Work(seconds, 1, 3 * kept, fresh, of=("loss_gradients",), instead=instead)


@prices("gradient_layer_squares", "gradient_layer_overlaps")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("_gradient_products",))


@prices("gradient_gram")
def _(pieces: Pieces, needs: Needs) -> Work:
    if pieces.samples <= Statistics.most_pairs:
        return Work(of=("_gradient_products",))
    kept = 2 * pieces.samples**2 * pieces.item
    seconds = pieces.pull + pieces.gram() / pieces.outputs**2
    return Work(seconds, 1, kept, pieces.pulled(1) + pieces.one_pass, of=("loss_gradients",))


@prices("gradient_curvature")
def _(pieces: Pieces, needs: Needs) -> Work:
    """Products with Hessians, each of a pass there, a pass back through it and norms' own."""
    products = PRODUCTS + PARTS
    seconds = products * (3 * pieces.vjp + pieces.norms(1)) + 2 * PARTS * pieces.vjp
    passes = 4 * products + 2 * PARTS
    fresh = 3 * pieces.one_pass + pieces.chunk(1) + pieces.norms_keep
    return Work(seconds, passes, 0, fresh, of=("loss_gradients",), instead="take fewer samples")


@prices("mean_gradient")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(2 * pieces.vjp, 1, pieces.parameter_bytes, 2 * pieces.one_pass)


@prices("hessian_operator", "gauss_newton_operator", "fisher_operator")
def _(pieces: Pieces, needs: Needs) -> Work:
    """A backward pass with its tape, and finite differences on a few samples in float64."""
    few = 12 * pieces.vjp * max(1 / Statistics.checked, 1 / pieces.samples)
    return Work(2 * pieces.vjp + few, 2, 0, 2 * pieces.one_pass)


@prices("wide_loss")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(kept=8 * pieces.parameter_bytes / pieces.item)


@prices("term_products", "parameter_groups", "gradient_batch")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work()  # of training steps alone, or a number


@prices("drawn_sqnorms")
def _(pieces: Pieces, needs: Needs) -> Work:
    return rows(pieces, pieces.draws)


@prices("_sqnorms")
def _(pieces: Pieces, needs: Needs) -> Work:
    turned = bool(needs & Statistics.of_fisher) and pieces.has_likelihood
    instead = "Jacobian.estimate_trace(relative_error=...) takes few passes"
    return rows(pieces, pieces.outputs, ("fisher_metric",) if turned else (), instead)


@prices("trace", "layer_traces")
def _(pieces: Pieces, needs: Needs) -> Work:
    if pieces.exact:
        return Work(of=("_sqnorms",))
    return rows(pieces, min(8, pieces.outputs))  # the fewest; more where they differ much


@prices("sample_traces")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("_sqnorms",) if pieces.exact else ())


@prices("centred_trace")
def _(pieces: Pieces, needs: Needs) -> Work:
    return rows(pieces, pieces.outputs)


@prices("fisher_column_sqnorms")
def _(pieces: Pieces, needs: Needs) -> Work:
    found = rows(pieces, pieces.outputs, (), "fisher/trace_per_layer sums it over each parameter")
    cotangents = pieces.samples * pieces.outputs**2 * pieces.item
    return replace(found, kept=pieces.parameter_bytes, whole=2 * cotangents)


@prices("fisher_sqnorms", "fisher_layer_sqnorms")
def _(pieces: Pieces, needs: Needs) -> Work:
    if pieces.exact and needs & _TRACES and pieces.has_likelihood:
        return Work(of=("_sqnorms",))
    cotangents = pieces.samples * pieces.outputs**2 * pieces.item
    found = rows(pieces, pieces.outputs, (), "fisher/trace_mc draws targets, for few passes")
    return replace(found, whole=2 * cotangents)


@prices("hessian_trace", "hessian_layer_traces")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("fisher_sqnorms" if pieces.has_exact_curvature[0] else "hessian_estimates",))


@prices("gauss_newton_trace")
def _(pieces: Pieces, needs: Needs) -> Work:
    exact = pieces.has_exact_curvature[1]
    return Work(of=("fisher_sqnorms" if exact else "gauss_newton_estimates",))


def _products(pieces: Pieces, matrix: str, count: int, vectors: int) -> Work:
    """Products with a matrix of second derivatives, and vectors as long as the weights."""
    group = {"gauss_newton": "ggn", "stability": "hessian"}.get(matrix, matrix)
    instead = f"'{group}/lambda_max' takes fewest products" if count > 15 else ""
    return Work(
        count * 4 * pieces.vjp,
        2 * count,
        pieces.parameter_bytes,
        vectors * pieces.parameter_bytes + 3 * pieces.one_pass,
        of=(f"{matrix}_operator",),
        instead=instead,
    )


#: How many products each statistic of a matrix takes, or about so many.
_COUNTS = {"top": 12, "leading": 40, "bottom": 50, "lowest": 120, "estimates": 60, "density": 120}


def _priced(matrix: str, what: str) -> None:
    @prices(f"{matrix}_{what}")
    def _(pieces: Pieces, needs: Needs) -> Work:
        return _products(pieces, matrix, _COUNTS[what], min(_COUNTS[what], 36))


for _matrix in ("hessian", "gauss_newton", "fisher", "stability"):
    for _what in _COUNTS:
        if hasattr(Statistics, f"{_matrix}_{_what}"):
            _priced(_matrix, _what)


@prices("hessian_diagonal")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("hessian_estimates",))


@prices("hessian_layer_tops")
def _(pieces: Pieces, needs: Needs) -> Work:
    return _products(pieces, "hessian", _COUNTS["top"] * pieces.layers, 12)


@prices("stability_operator")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(kept=2 * pieces.parameter_bytes, of=("hessian_operator",))


@prices("stability_threshold", "learning_rates")
@prices("hessian_eigenvector", "gauss_newton_eigenvector", "fisher_eigenvector")
@prices("stability_eigenvector", "hessian_check")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work()  # known, or found with the eigenvalue or the operator


@prices("_kernel")
def _(pieces: Pieces, needs: Needs) -> Work:
    """The Gram matrix, or else the blocks, of all layers."""
    order, c = pieces.samples * pieces.outputs, pieces.outputs
    passes = pieces.passes_for_pairs
    fresh = pieces.pulled(c) + pieces.blocks_keep
    temporary = fresh + pieces.written(c) + pieces.one_pass
    seconds = passes * pieces.depth * pieces.pull + pieces.blocks() + pieces.touch(fresh)
    kept = pieces.layers * order * c * pieces.item
    if not needs & Statistics.of_gram:
        instead = "ntk/trace and fisher/trace need no blocks"
        return Work(seconds, passes, kept, temporary, of=("jacobian",), instead=instead)
    return Work(
        seconds + pieces.gram(),
        passes,
        kept + order**2 * pieces.item,
        temporary + pieces.gram_sums,
        of=("jacobian",),
        instead="Jacobian.gram(trace_outputs=True) sums it over outputs, Jacobian.sketch and "
        "Jacobian.approximate_gram estimate it",
    )


@prices("gram", "traced_gram", "layer_blocks", "blocks")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("_kernel",))


@prices("eigenvalues")
def _(pieces: Pieces, needs: Needs) -> Work:
    order = pieces.samples * pieces.outputs
    return _spectrum(pieces, order, "Jacobian.spectrum(k) finds the k largest without the matrix")


@prices("traced_eigenvalues")
def _(pieces: Pieces, needs: Needs) -> Work:
    return _spectrum(pieces, pieces.samples, "Jacobian.gram(trace_outputs=True) forms less")


@prices("cosine_eigenvalues")
def _(pieces: Pieces, needs: Needs) -> Work:
    return _spectrum(pieces, pieces.samples * pieces.outputs, "ntk/entropy has no cosines")


@prices("eigenvectors")
def _(pieces: Pieces, needs: Needs) -> Work:
    return _vectors(pieces, pieces.samples * pieces.outputs, "eigenvalues")


@prices("traced_eigenvectors")
def _(pieces: Pieces, needs: Needs) -> Work:
    return _vectors(pieces, pieces.samples, "traced_eigenvalues")


@prices("leading_eigenvectors")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("eigenvectors",))


def _vectors(pieces: Pieces, order: int, values: str) -> Work:
    """Beside the eigenvalues, as long again."""
    return Work(pieces.eigenvalues(order), kept=8 * order**2, whole=8 * order**2, of=(values,))


@prices("partial_eigenvalues")
def _(pieces: Pieces, needs: Needs) -> Work:
    return _parts(pieces, pieces.samples * pieces.outputs)


@prices("traced_partial_eigenvalues")
def _(pieces: Pieces, needs: Needs) -> Work:
    return _parts(pieces, pieces.samples)


def _parts(pieces: Pieces, order: int) -> Work:
    groups = min(GROUPS, pieces.samples)
    one = _spectrum(pieces, order, "ntk/entropy is not corrected")
    return replace(
        one, seconds=groups * one.seconds * (1 - 1 / groups) ** 3, kept=8 * order * groups
    )


@prices("fisher_eigenvalues", "fisher_layer_eigenvalues")
def _(pieces: Pieces, needs: Needs) -> Work:
    """A Gram matrix of its own, of each layer where their spectra are wanted."""
    order, passes = pieces.samples * pieces.outputs, pieces.passes_for_pairs
    spectra = 1 + pieces.layers if "fisher_layer_eigenvalues" in needs else 1
    one = _spectrum(pieces, order, "fisher/trace_per_layer needs no matrix")
    seconds = passes * pieces.pull + pieces.gram() + spectra * one.seconds
    kept = spectra * order**2 * pieces.item
    temporary = pieces.pulled(pieces.outputs) + pieces.one_pass
    of = ("jacobian",)
    return replace(one, seconds=seconds, passes=passes, kept=kept, temporary=temporary, of=of)


@prices("cross_kernels")
def _(pieces: Pieces, needs: Needs) -> Work:
    fresh = pieces.pulled(1)
    seconds = pieces.outputs * pieces.pull + pieces.gram() / pieces.outputs
    kept = pieces.samples**2 * pieces.item
    return Work(seconds, pieces.outputs, kept, fresh + pieces.one_pass, of=("jacobian",))


@prices("linearised_outputs")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(3 * pieces.vjp, 2, temporary=3 * pieces.one_pass, kept=pieces.parameter_bytes)


@prices("linearised_losses")
def _(pieces: Pieces, needs: Needs) -> Work:
    return Work(of=("linearised_outputs",))


@prices("preconditioned_trace")
def _(pieces: Pieces, needs: Needs) -> Work:
    found = rows(pieces, pieces.outputs, (), "ntk/trace needs no gradients written out")
    return replace(found, seconds=found.seconds + pieces.written_out)


@prices("preconditioned_eigenvalues")
def _(pieces: Pieces, needs: Needs) -> Work:
    order, c = pieces.samples * pieces.outputs, pieces.outputs
    seconds = pieces.passes_for_pairs * pieces.pull + pieces.written_out + pieces.dense_gram
    one = _spectrum(pieces, order, "ntk/spectrum needs no gradients written out")
    temporary = pieces.pulled(c) + pieces.written(c) + pieces.one_pass
    return replace(
        one, seconds=seconds + one.seconds, temporary=temporary, passes=c, of=("jacobian",)
    )


def _spectrum(pieces: Pieces, order: int, instead: str) -> Work:
    matrix = 8 * order**2
    seconds = pieces.eigenvalues(order)
    return Work(seconds, kept=8 * order, whole=2 * matrix, of=("gram",), instead=instead)


def _unknown(pieces: Pieces, needs: Needs) -> Work:
    return rows(pieces, pieces.outputs)


def works(pieces: Pieces, needs: Iterable[str]) -> list[Work]:
    """All that some statistics take, each part once; "first.gram" costs what "gram" does."""
    needs = frozenset(need.rpartition(".")[2] for need in needs)
    found: dict[str, Work] = {}
    left = sorted(needs)
    while left:
        name = left.pop()
        if name not in found:
            found[name] = PRICES.get(name, _unknown)(pieces, needs)
            left += found[name].of
    return list(found.values())


def price(pieces: Pieces, needs: Iterable[str]) -> Price:
    """What some statistics cost together, beside the look at the network."""
    return total(works(pieces, needs))


def total(found: Sequence[Work]) -> Price:
    """What pieces of work cost together; temporary results are let go of one after the other."""
    return Price(
        sum(work.seconds for work in found),
        sum(work.kept for work in found) + max((w.temporary + w.whole for w in found), default=0),
        sum(work.passes for work in found),
    )


def duration(seconds: float) -> str:
    """A time to two digits, as people say it."""
    for unit, length in (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= length or unit == "ms":
            return f"{float(f'{seconds / length:.2g}'):,.10g} {unit}"
    raise AssertionError


def size(number: float) -> str:
    """A number of bytes to two digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
