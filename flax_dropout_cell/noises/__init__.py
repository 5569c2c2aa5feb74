"""The noises: a file each."""

from .concrete import ConcreteDropout as ConcreteDropout
from .dropout import Dropout as Dropout
from .gaussian import GaussianNoise as GaussianNoise
from .protocol import Noise as Noise
from .protocol import register_noise as register_noise
from .zoneout import Zoneout as Zoneout
