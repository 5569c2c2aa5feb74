"""The noises: a file each."""

from .dropout import Dropout as Dropout
from .protocol import Noise as Noise
from .protocol import register_noise as register_noise
