"""From the encoder's layer states to what the DiT is told, by one of several strategies."""

from unifusion_jax.conditioning.conditioner import Conditioner as Conditioner
from unifusion_jax.conditioning.conditioner import LAPConditioner as LAPConditioner
from unifusion_jax.conditioning.conditioner import LayerConditioner as LayerConditioner
from unifusion_jax.conditioning.config import STRATEGIES as STRATEGIES
from unifusion_jax.conditioning.config import ConditioningConfig as ConditioningConfig
from unifusion_jax.conditioning.config import Selection as Selection
from unifusion_jax.conditioning.injection import HiddenStateInjection as HiddenStateInjection
from unifusion_jax.conditioning.injection import LAPInjection as LAPInjection
from unifusion_jax.conditioning.kv_fusion import KVFusion as KVFusion
from unifusion_jax.conditioning.lap import LAP as LAP
from unifusion_jax.conditioning.lap import LAPConfig as LAPConfig
from unifusion_jax.conditioning.refiner import Refiner as Refiner
from unifusion_jax.conditioning.refiner import RefinerConfig as RefinerConfig

CONDITIONERS: dict[str, type[Conditioner]] = {
    "lap": LAPConditioner,
    "last_layer": LayerConditioner,
    "kv_fusion": KVFusion,
    "hidden_state_injection": HiddenStateInjection,
    "lap_injection": LAPInjection,
}
