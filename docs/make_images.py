"""Draws the pictures of the docs that come from the library itself: `python docs/make_images.py`.

They lie in docs/images, in the repository.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

import flax_dropout_cell as fdc

IMAGES = Path(__file__).parent / "images"


def masks(folder: Path) -> Path:
    """The first picture of the README: stripes at the input and on h, snow at the output."""
    frozen = fdc.Dropout(keep_prob=0.7, variational=True)
    fresh = fdc.Dropout(keep_prob=0.7)
    batch, steps, features, units = 4, 60, 16, 24
    figure = fdc.plot_masks(
        fdc.init_lstm(jax.random.key(0), features, units),
        fdc.LSTMState(jnp.zeros((batch, units)), jnp.zeros((batch, units))),
        jnp.zeros((steps, batch, features)),
        jax.random.key(1),
        cell=fdc.lstm_cell,
        dropout=fdc.RecurrentDropout(input=frozen, inside={"recurrent": frozen}, output=fresh),
        max_units=16,
    )
    path = folder / "masks.png"
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    print(f"wrote {masks(IMAGES)}")
