"""Published schemes. A recipe is the `RecurrentDropout` of one layer of a stack.

A layer's output is the next layer's input, so give `input_keep_prob` to every layer and
`output_keep_prob` to the last one only. Recipes that use sites inside the cell need a cell that
has them, such as `lstm_cell`, or `LSTMCell` of `linen` and `nnx`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import jax

from ._arguments import check_flag
from ._messages import short_repr
from ._spec.recurrent_dropout import RecurrentDropout
from ._spec.weight_paths import recurrent_kernels
from .noises import Dropout, Zoneout
from .noises.arguments import check_probability

Probability = float | jax.Array
_Arguments = ParamSpec("_Arguments")

__all__ = ["gal2016", "krueger2016", "merity2017", "semeniuta2016", "zaremba2014"]


def __dir__() -> list[str]:
    return __all__


def _by_name(
    recipe: Callable[_Arguments, RecurrentDropout],
) -> Callable[_Arguments, RecurrentDropout]:
    """Makes numbers without their names an error that shows the names: they may well be rates."""
    names = inspect.signature(recipe).parameters

    @functools.wraps(recipe)
    def run(*positional: _Arguments.args, **named: _Arguments.kwargs) -> RecurrentDropout:
        unknown = [*map(short_repr, positional), *(name for name in named if name not in names)]
        if unknown:
            hint = " A keep_prob is 1 minus a rate." if "keep_prob" in "".join(names) else ""
            raise TypeError(
                f"{recipe.__name__} takes its numbers by name: {', '.join(names)}; got "
                f"{', '.join(unknown)}.{hint}"
            )
        return recipe(*positional, **named)

    return run


def _check(**probabilities: Probability) -> None:
    """Checks probabilities under the recipe's argument names, which its noises do not know."""
    for name, probability in probabilities.items():
        check_probability(name, probability)


@_by_name
def zaremba2014(
    *, input_keep_prob: Probability, output_keep_prob: Probability = 1.0
) -> RecurrentDropout:
    """Dropout between layers, none between steps: Zaremba et al. 2014, arXiv:1409.2329.

    The gates read `D(h_t^{l-1})` and `h_{t-1}^l`; D draws a fresh mask at each step. There is no
    default because the paper has several configurations (keep probabilities of 0.5 and 0.35).

    Dropout on the embedding is the `input` of the first layer, and dropout before the softmax is
    the `output` of the last. Not in the spec: the initial range, the clipping and the schedule.

    Args:
      input_keep_prob: for each layer's input, in [0, 1].
      output_keep_prob: for the last layer's output only.

    Returns:
      A `RecurrentDropout` for any cell.

    Raises:
      ValueError: if a probability is not in [0, 1].
      TypeError: if one is not a number or an array.

    Example:
      >>> import flax_dropout_cell as fdc
      >>> stack = [
      ...     fdc.recipes.zaremba2014(input_keep_prob=0.5),
      ...     fdc.recipes.zaremba2014(input_keep_prob=0.5, output_keep_prob=0.5),
      ... ]
      >>> stack[1].input.keep_prob, stack[1].input.variational
      (0.5, False)
    """
    _check(input_keep_prob=input_keep_prob, output_keep_prob=output_keep_prob)
    return RecurrentDropout(
        input=Dropout(keep_prob=input_keep_prob), output=Dropout(keep_prob=output_keep_prob)
    )


@_by_name
def gal2016(
    *,
    input_keep_prob: Probability,
    recurrent_keep_prob: Probability,
    output_keep_prob: Probability = 1.0,
    tied: bool = True,
) -> RecurrentDropout:
    """Variational dropout: Gal and Ghahramani 2016, arXiv:1512.05287, section 4.

    Each sequence and row has one mask for the gates' view of x and another for their view of h.
    If tied (equation 7), all gates read the same `x z_x` and `h z_h`. If untied (equation 5), each
    gate has masks of its own, `[*batch, gates, size]`. There is no default because the paper
    searches for its probabilities.

    Not in the spec: dropout of whole word types (`embedding_dropout`), weight decay, and averaging
    over samples at test time (`mc_samples`). The paper's code draws new masks for each window of
    35 steps while the state is carried on; each call of a layer does the same.

    Args:
      input_keep_prob: for x, in [0, 1].
      recurrent_keep_prob: for h as the gates read it; the h that is emitted stays whole.
      output_keep_prob: for the last layer's output only.
      tied: whether all gates share a mask.

    Returns:
      A `RecurrentDropout` for a cell with the sites `recurrent`, or if untied `input_per_gate`
      and `recurrent_per_gate`.

    Raises:
      ValueError: if a probability is not in [0, 1].
      TypeError: if one is not a number or an array, or `tied` is not a bool.

    Example:
      >>> import flax_dropout_cell as fdc
      >>> spec = fdc.recipes.gal2016(input_keep_prob=0.8, recurrent_keep_prob=0.7)
      >>> spec.inside["recurrent"].keep_prob
      0.7
    """
    _check(
        input_keep_prob=input_keep_prob,
        recurrent_keep_prob=recurrent_keep_prob,
        output_keep_prob=output_keep_prob,
    )
    check_flag("tied", tied)
    reads_x = Dropout(keep_prob=input_keep_prob, variational=True)
    reads_h = Dropout(keep_prob=recurrent_keep_prob, variational=True)
    inside: dict[str, Any] = {"recurrent": reads_h}
    if not tied:
        inside = {"input_per_gate": reads_x, "recurrent_per_gate": reads_h}
    return RecurrentDropout(
        input=reads_x if tied else None,
        inside=inside,
        output=Dropout(keep_prob=output_keep_prob, variational=True),
    )


@_by_name
def semeniuta2016(
    *,
    candidate_keep_prob: Probability,
    input_keep_prob: Probability = 1.0,
    output_keep_prob: Probability = 1.0,
) -> RecurrentDropout:
    """Recurrent dropout without memory loss: Semeniuta et al. 2016, arXiv:1603.05118, section 3.

    Dropout on the update of the memory, not on the memory itself: `c' = f c + i D(g)` in an LSTM,
    `h' = (1 - z) D(n) + z h` in a GRU. D draws a fresh mask at each step, as the paper advises.
    There is no default because the paper compares several probabilities.

    Not in the spec: the paper's variant with one mask per sequence. Write it as
    `RecurrentDropout(inside={"candidate": Dropout(keep_prob=.., variational=True)})`.

    Args:
      candidate_keep_prob: for the candidate, g or n after its tanh, in [0, 1].
      input_keep_prob: for each layer's input, at each step.
      output_keep_prob: for the last layer's output only.

    Returns:
      A `RecurrentDropout` for a cell with the site `candidate`.

    Raises:
      ValueError: if a probability is not in [0, 1].
      TypeError: if one is not a number or an array.

    Example:
      >>> import flax_dropout_cell as fdc
      >>> spec = fdc.recipes.semeniuta2016(candidate_keep_prob=0.75)
      >>> spec.inside["candidate"].keep_prob
      0.75
    """
    _check(
        candidate_keep_prob=candidate_keep_prob,
        input_keep_prob=input_keep_prob,
        output_keep_prob=output_keep_prob,
    )
    return RecurrentDropout(
        input=Dropout(keep_prob=input_keep_prob),
        inside={"candidate": Dropout(keep_prob=candidate_keep_prob)},
        output=Dropout(keep_prob=output_keep_prob),
    )


@_by_name
def krueger2016(
    *, cell_prob: Probability = 0.5, hidden_prob: Probability = 0.05
) -> RecurrentDropout:
    """Zoneout of an LSTM: Krueger et al. 2016, arXiv:1606.01305, section 3.

    At each step a unit of c keeps its old value with probability `cell_prob`, and a unit of h
    with probability `hidden_prob`. The output gate reads the new c before zoneout; the h that is
    emitted is the h that is carried on. Evaluation mixes old and new values by these
    probabilities. The defaults are those of the paper's character models.

    Not in the spec: the one mask for c and h of the paper's permuted MNIST, where both
    probabilities are 0.15 (here their masks are independent); the recurrent batch normalization of
    its best result there; and the dropout between layers of its word model, as in `zaremba2014`,
    with 0.25 for c and 0.025 for h. A GRU has one state, its h:
    `RecurrentDropout(inside={"hidden": Zoneout(prob=..)})`.

    Args:
      cell_prob: for c, in [0, 1].
      hidden_prob: for h.

    Returns:
      A `RecurrentDropout` for an LSTM with the site `hidden` and a state `(c, h)`. If a cell of
      your own carries `(h, c)`, as Equinox's do, replace `state` by `(None, Zoneout(..))`: the pair
      does not say which leaf is c.

    Raises:
      ValueError: if a probability is not in [0, 1].
      TypeError: if one is not a number or an array.

    Example:
      >>> import flax_dropout_cell as fdc
      >>> spec = fdc.recipes.krueger2016()
      >>> spec.state[0].prob, spec.inside["hidden"].prob
      (0.5, 0.05)
    """
    _check(cell_prob=cell_prob, hidden_prob=hidden_prob)
    return RecurrentDropout(
        state=(Zoneout(prob=cell_prob), None), inside={"hidden": Zoneout(prob=hidden_prob)}
    )


@_by_name
def merity2017(
    *, weight_keep_prob: Probability = 0.5, input_keep_prob: Probability = 1.0
) -> RecurrentDropout:
    """Weight-drop, as in AWD-LSTM: Merity et al. 2017, arXiv:1708.02182, section 2.

    DropConnect on the recurrent kernels, `M U / keep_prob`: M has an element for each weight, and
    is the same for all rows and steps of a call. Each layer's input has one mask per sequence and
    row (their locked dropout, section 4.2). The default is the paper's for Penn Treebank and
    WikiText-2. For Penn Treebank the paper keeps 0.6 of the first layer's input and 0.7 of the
    others'; the authors' later code keeps 0.75 of the others'.

    Not in the spec: the locked dropout on the last layer's output (0.6 kept there), dropout of
    whole word types (`embedding_dropout`, 0.9 kept), AR and TAR
    (`activation_regularization`, `temporal_activation_regularization`), weight decay, NT-ASGD.

    Args:
      weight_keep_prob: for each element of the recurrent kernels, in [0, 1].
      input_keep_prob: for each layer's input.

    Returns:
      A `RecurrentDropout` for a cell whose recurrent kernels `recurrent_kernels` can find.

    Raises:
      ValueError: if a probability is not in [0, 1].
      TypeError: if one is not a number or an array.

    Example:
      >>> import flax_dropout_cell as fdc
      >>> spec = fdc.recipes.merity2017(input_keep_prob=0.75)
      >>> spec.params.noise.keep_prob, spec.input.keep_prob
      (0.5, 0.75)
    """
    _check(weight_keep_prob=weight_keep_prob, input_keep_prob=input_keep_prob)
    return RecurrentDropout(
        params=recurrent_kernels(Dropout(keep_prob=weight_keep_prob, variational=True)),
        input=Dropout(keep_prob=input_keep_prob, variational=True),
    )
