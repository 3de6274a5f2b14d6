"""From the encoder's layer states to the DiT's condition tokens."""

from unifusion_jax.conditioning.conditioner import ConditioningConfig as ConditioningConfig
from unifusion_jax.conditioning.conditioner import LAPConditioner as LAPConditioner
from unifusion_jax.conditioning.lap import LAP as LAP
from unifusion_jax.conditioning.lap import LAPConfig as LAPConfig
from unifusion_jax.conditioning.refiner import Refiner as Refiner
from unifusion_jax.conditioning.refiner import RefinerConfig as RefinerConfig
