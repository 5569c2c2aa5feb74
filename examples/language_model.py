"""A word-level LSTM language model, trained without dropout and with it.

Embedding, a stack of LSTMs, softmax: the model of Zaremba et al. 2014 (arXiv:1409.2329), with
their per-step dropout or with the variational dropout of Gal and Ghahramani 2016
(arXiv:1512.05287). It is trained by truncated backpropagation: the carry is handed from window to
window, and each window draws new masks.

    python examples/language_model.py                 # Python's own language reference
    python examples/language_model.py --data DIR      # text in Penn Treebank's format
    python examples/language_model.py --scheme per-step --recurrent-keep-prob 1     # Zaremba's
    python examples/language_model.py --config awd-lstm --data DIR     # a paper's, alone

It ends with a table of perplexities, and writes them to `language_model.json` and their curves to
`language_model.png` in `--out`; with `--config NAME`, to `NAME.json` and `NAME.png`. Ctrl-C ends
the training and reports what was learned until then. With `--checkpoint DIR`, a run that was killed
resumes when it is started again, and ends with the same perplexities.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from command_line import run
from configs import SCHEMES, Config, build_dropouts
from corpus import Corpus, Rows, Windows, lay_out, pad, plan_windows, window_at
from evaluation import sum_nll
from optimizers import build_optimizer
from tqdm import tqdm
from train_state import TrainState, build_end_epoch, start_training

import flax_dropout_cell as fdc

if TYPE_CHECKING:
    from checkpoints import Checkpoints

WINDOWS_PER_CALL = 20
"""So many are trained on in one call: after each, the bar moves and Ctrl-C is heard."""

Carry = tuple[tuple[jax.Array, jax.Array], ...]
"""The `(c, h)` of each LSTM in the stack: what is handed from window to window."""


# The model ---------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Predicts the next word at each step of a window.

    Attributes:
      config: sizes and probabilities.
      vocabulary_size: how many words there are to predict.
      deterministic: True in evaluation.
    """

    config: Config
    vocabulary_size: int
    deterministic: bool = False

    @nn.compact
    def __call__(
        self,
        words: jax.Array,
        carry: Carry,
        *,
        lengths: jax.Array | None = None,
        start: int | jax.Array = 0,
        sequence_ids: jax.Array | None = None,
        keep_words: bool = False,
    ) -> tuple[jax.Array, Carry, tuple[jax.Array, jax.Array]]:
        """Predicts the words that follow.

        Args:
          words: `[batch, window]`.
          carry: the end of the window before.
          lengths: `[batch]`, of windows that are padded.
          start: the step at which the window starts.
          sequence_ids: `[batch, window]`; a new id brings new masks, and the carry goes on.
          keep_words: True drops no word types.

        Returns:
          Logits `[batch, window, vocabulary]`, the carry for the next window, and the last LSTM's
          outputs before and after their dropout.
        """
        config = self.config
        embed = fdc.linen.Embed(
            self.vocabulary_size,
            config.embedding_size,
            keep_prob=1.0 if config.scheme == "none" else config.word_keep_prob,
            per_example=config.words_per_row,
            deterministic=self.deterministic or keep_words,
        )
        x, ends = embed(words), []
        resets = None if sequence_ids is None else jnp.zeros(words.shape, bool)
        for size, dropout, begin in zip(config.sizes, build_dropouts(config), carry, strict=True):
            cell = fdc.linen.LSTMCell(size)
            rnn = fdc.linen.RNN(cell, dropout, self.deterministic, unroll=config.unroll)
            end, x = rnn(
                x,
                initial_carry=begin,
                seq_lengths=lengths,
                start=start,
                resets=resets,
                sequence_ids=sequence_ids,
                return_carry=True,
            )
            ends.append(end)
        raw = x
        if config.scheme == "weight-drop":
            x = nn.Dropout(
                1 - config.output_keep_prob, broadcast_dims=(1,), deterministic=self.deterministic
            )(x)
        if config.tied:
            bias = self.param("bias", nn.initializers.zeros, (self.vocabulary_size,))
            logits = embed.attend(x) + bias[None, None]
        else:
            logits = nn.Dense(self.vocabulary_size)(x)
        return logits, tuple(ends), (raw, x)

    @nn.nowrap
    def zero_carry(self, batch_size: int) -> Carry:
        shapes = [(batch_size, size) for size in self.config.sizes]
        return tuple((jnp.zeros(shape), jnp.zeros(shape)) for shape in shapes)


# The training ------------------------------------------------------------------------------------


def build_train_window(
    config: Config, model: LanguageModel, rng: jax.Array
) -> Callable[..., TrainState]:
    """The step that learns from one window; its masks depend on `rng` and `state.step` only."""
    optimizer = build_optimizer(config)

    def loss_of(
        params: Any, carry: Carry, window: Rows, length: jax.Array, rng: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Carry]]:
        lengths = jnp.full(config.batch_size, length) if config.random_windows else None
        outputs: Any = model.apply(
            params, window.inputs, carry, lengths=lengths, rngs={"dropout": rng}
        )
        logits, carry, (raw, dropped) = outputs
        nll = sum_nll(logits, window)
        # Over the length of a window, or the few words in an epoch's last would weigh more.
        loss = nll / config.batch_size / (1 if config.sum_over_time else length)
        if config.activation:
            loss += config.activation * fdc.activation_regularization(
                dropped, seq_lengths=lengths, time_axis=1
            )
        if config.temporal_activation:
            loss += config.temporal_activation * fdc.temporal_activation_regularization(
                raw, seq_lengths=lengths, time_axis=1
            )
        return loss, (nll, carry)

    def train_window(
        state: TrainState, window: Rows, length: jax.Array, rate: jax.Array
    ) -> TrainState:
        window_rng = jax.random.fold_in(rng, state.step)
        grads, (nll, carry) = jax.grad(loss_of, has_aux=True)(
            state.params, state.carry, window, length, window_rng
        )
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, rate=rate * length / config.window
        )
        return state._replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            carry=carry,
            nll=state.nll + nll,
        )

    return train_window


def build_train_windows(
    config: Config, model: LanguageModel, rng: jax.Array
) -> Callable[..., TrainState]:
    """Builds the function that trains on the first `count` windows, as one program."""
    train_window = build_train_window(config, model, rng)

    @jax.jit
    def train_windows(
        state: TrainState, rows: Rows, windows: Windows, count: jax.Array, rate: jax.Array
    ) -> TrainState:
        def step(index: jax.Array, state: TrainState) -> TrainState:
            start, length = (part[index] for part in windows)
            window = window_at(rows, start, config.longest_window)
            if config.random_windows:
                inside = jnp.arange(config.longest_window) < length
                window = window._replace(weights=jnp.where(inside[None], window.weights, 0))
            return train_window(state, window, length, rate)

        return jax.lax.fori_loop(0, count, step, state)

    return train_windows


def train(
    config: Config, corpus: Corpus, checkpoints: "Checkpoints | None" = None
) -> Iterator[TrainState]:
    """Trains a model; yields its state after each epoch.

    Raises:
      FloatingPointError: the training diverged.
    """
    model = LanguageModel(config, len(corpus.vocabulary))
    init_rng, dropout_rng = jax.random.split(jax.random.key(config.seed))
    train_windows = build_train_windows(config, model, dropout_rng)
    end_epoch = build_end_epoch(config, model, corpus)
    rows = jax.device_put(lay_out(corpus.train, config.batch_size, config.longest_window))
    epochs = [plan_windows(config, rows, epoch) for epoch in range(config.epochs)]
    ends = np.cumsum([len(windows.starts) for windows in epochs])
    words_at = np.cumsum(np.sum(rows.weights, axis=0), dtype=int)  # after each step of an epoch
    state = start_training(config, model, init_rng)
    if checkpoints is not None:
        state = checkpoints.restore(state)
    step, began = int(state.step), time.monotonic() - float(state.seconds)
    if step >= ends[0]:
        yield state
    with tqdm(
        total=config.epochs * len(corpus.train),
        initial=step * len(corpus.train) * config.epochs // int(ends[-1]),  # or nearly so
        desc=SCHEMES[config.scheme],
        unit=" words",
        unit_scale=True,
    ) as bar:
        while step < ends[-1]:
            epoch = int(np.searchsorted(ends, step, side="right"))
            index = step - int(ends[epoch]) + len(epochs[epoch].starts)
            if index == 0:
                zeros = model.zero_carry(config.batch_size)
                state = state._replace(carry=zeros, nll=jnp.float32(0))
            count = min(int(ends[epoch]) - step, WINDOWS_PER_CALL)
            if checkpoints is not None:
                count = min(count, checkpoints.every - step % checkpoints.every)
            windows = Windows(*(part[index : index + count] for part in epochs[epoch]))
            rate = np.float32(config.learning_rate_at(epoch))
            state = train_windows(state, rows, pad(windows, WINDOWS_PER_CALL), count, rate)
            step += count
            words = int(words_at[windows.starts[-1] + windows.lengths[-1] - 1])
            # Reading the loss waits for the step, so that the bar and Ctrl-C keep up with it.
            loss = float(state.nll) / words
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.3f}", refresh=False)
            bar.update(epoch * len(corpus.train) + words - bar.n)
            if step == ends[epoch]:
                state = end_epoch(state, epoch, loss)
            state = state._replace(seconds=jnp.float32(time.monotonic() - began))
            if checkpoints is not None:
                checkpoints.save(step, state, last=step == ends[-1])
            if step == ends[epoch]:
                yield state


def main() -> int:
    return run(train, LanguageModel)


if __name__ == "__main__":
    sys.exit(main())
