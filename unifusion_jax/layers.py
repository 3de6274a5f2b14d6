"""Building blocks shared by every network: linear maps, norms and stacks of repeated blocks.

Every parameter carries the names of its logical axes in the variable's metadata (`axes`), which
`unifusion_jax.parallel.sharding` maps to mesh axes. The letters in shape annotations are listed in `docs/architecture.md`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PyTree

Axes = tuple[str | None, ...]
Remat = Callable[[Callable[..., Any]], Callable[..., Any]]

if TYPE_CHECKING:
    AnyArray = Any  # checkers would ask for the methods that all three share
else:
    AnyArray = Array | np.ndarray | jax.ShapeDtypeStruct
_Class = TypeVar("_Class", bound=type)


def pytree(cls: _Class) -> _Class:
    """Registers a frozen dataclass as a pytree of all its fields.

    Rebuilding skips `__init__`, so that transformations may put any kind of leaf (shardings, specs, sentinels) in the
    fields.
    """
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(instance: Any) -> tuple[tuple[Any, ...], None]:
        return tuple(getattr(instance, name) for name in names), None

    def flatten_with_keys(instance: Any) -> tuple[tuple[tuple[jax.tree_util.GetAttrKey, Any], ...], None]:
        return tuple((jax.tree_util.GetAttrKey(name), getattr(instance, name)) for name in names), None

    def unflatten(_: None, leaves: Any) -> Any:
        instance = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(instance, name, leaf)
        return instance

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


# Name, for policies of `jax.checkpoint`, of what enters a block that is computed again in the backward pass.
BLOCK_INPUT = "block_input"
_LARGEST_CUT_BYTES = 4 << 30
_ZEROS = nnx.initializers.zeros_init()
_KERNEL_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_SMALL = nnx.initializers.normal(0.02)


class ShapesOnly(nnx.Rngs):
    """In the place of `nnx.Rngs` where a network is traced for its shapes: its key is None, parameters are zeros.

    Most of the time that tracing takes would go into random initialisers, whose values nobody looks at.
    """

    def params(self) -> None:
        """Returns no key."""

    def fork(self, *, split: Any = None) -> "ShapesOnly":
        """Returns itself."""
        return self


def with_axes(initializer: Callable[..., Any], axes: Axes) -> Callable[..., Any]:
    """Returns `initializer`, tagging the parameter it makes with logical axis names; zeros where the key is None."""

    def make(key: Any, shape: Any, dtype: Any, **options: Any) -> jax.Array:
        return jnp.zeros(shape, dtype) if key is None else initializer(key, shape, dtype, **options)

    return nnx.with_metadata(make, axes=axes)


def normal(shape: tuple[int, ...], axes: Axes, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs) -> nnx.Param:
    """Makes a parameter of small normal numbers (standard deviation 0.02): tables, positions and the like."""
    return nnx.Param(with_axes(_SMALL, axes)(rngs.params(), shape, param_dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix in 8 bits, or a stack of them: the integers times the scale of their output channel.

    Attributes:
      values: int8 [..., in, out], from -127 to 127.
      scale: float32 [..., 1, out].
    """

    values: Any
    scale: Any


@jax.jit
def quantize_int8(kernel: Float[Array, "*stack in out"]) -> Int8:
    """Rounds a matrix to 8 bits: symmetric, the largest magnitude of an output channel becomes 127."""
    wide = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return Int8(jnp.round(wide / scale).astype(jnp.int8), scale)


class Linear(nnx.Linear):
    """`nnx.Linear` whose kernel may also be an `Int8`; then it computes in the type of its input."""

    def __call__(self, inputs: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Multiplies by the kernel and adds the bias, where there is one."""
        kernel: Any = self.kernel.get_value()
        if not isinstance(kernel, Int8):
            return super().__call__(inputs)
        # A scale per output channel commutes with the product; 8-bit integers are exact in bfloat16.
        product = jnp.matmul(inputs, kernel.values.astype(inputs.dtype), preferred_element_type=jnp.float32)
        product = product * kernel.scale[0]
        if self.bias is not None:
            product = product + self.bias.get_value()
        return product.astype(inputs.dtype)


def linear(
    in_features: int,
    out_features: int,
    axes: Axes,
    *,
    bias: bool = False,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    kernel_init: Callable[..., Any] = _KERNEL_INIT,
    rngs: nnx.Rngs,
) -> Linear:
    """Makes a linear map with kernel (in_features, out_features) whose dimensions are named by `axes`."""
    return Linear(
        in_features,
        out_features,
        use_bias=bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=with_axes(kernel_init, axes),
        bias_init=with_axes(_ZEROS, axes[-1:]),
        dot_general=_dot_general,
        rngs=rngs,
    )


def _dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """What `nnx.Linear` calls: the product over the last axis of x and the first of the kernel."""
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())) or any(option is not None for option in options.values()):
        raise ValueError(f"A linear map was asked for the product {dimension_numbers} with {options}.")
    return _matmul(x, kernel)


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel, whose gradient is written out.

    The automatic gradient of the kernel comes as (out, in) and is transposed, which XLA's CPU backend turns into a transposed
    copy of the activations' gradient: forward and backward of a transformer then take 1.5 times as long. Written as
    (in, out) at once it needs no copy.
    """
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(x, kernel), (x, kernel)


def _matmul_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rows = tuple(range(x.ndim - 1))
    of_x = jax.lax.dot_general(gradient, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    return of_x, jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))


_matmul.defvjp(_matmul_forward, _matmul_backward)


def conv(
    in_features: int,
    out_features: int,
    kernel_px: int,
    *,
    stride_px: int = 1,
    padding: Any = "SAME",
    bias: bool = True,
    kernel_init: Callable[..., Any] = _KERNEL_INIT,
    bias_init: Callable[..., Any] = _ZEROS,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Makes a square 2-D convolution over NHWC images, kernel (kernel_px, kernel_px, in_features, out_features)."""
    return nnx.Conv(
        in_features,
        out_features,
        (kernel_px, kernel_px),
        strides=stride_px,
        padding=padding,
        use_bias=bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=with_axes(kernel_init, (None, None, "conv_in", "conv_out")),
        bias_init=with_axes(bias_init, ("conv_out",)),
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32.

    `offset` is added to the learned scale: 0 for Llama and Qwen (scale starts at 1, the normalised value is cast before it
    is scaled), 1 for Gemma (scale starts at 0 and multiplies in float32).
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-6,
        offset: float = 0.0,
        axis: str | None = "norm",
        param_dtype: Any = jnp.float32,
    ):
        self.eps = eps
        self.offset = offset
        self.scale = nnx.Param(jnp.full((features,), 1.0 - offset, param_dtype), axes=(axis,))

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Returns the normalised input, in its own dtype."""
        wide = rms_normalised(x, self.eps)
        if self.offset:
            return (wide * (self.scale[...].astype(jnp.float32) + self.offset)).astype(x.dtype)
        return wide.astype(x.dtype) * self.scale[...].astype(x.dtype)


def rms_normalised(x: Float[Array, "*batch features"], eps: float) -> Float[Array, "*batch features"]:
    """Returns x over the root of its mean square along the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)


def layer_norm(
    features: int, *, eps: float, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """Makes a layer norm with scale and bias; the exact variance formula, since ports are held to 1e-4 of their reference."""
    return nnx.LayerNorm(
        features,
        epsilon=eps,
        dtype=dtype,
        param_dtype=param_dtype,
        use_fast_variance=False,
        scale_init=with_axes(nnx.initializers.ones_init(), ("norm",)),
        bias_init=with_axes(nnx.initializers.zeros_init(), ("norm",)),
        rngs=rngs,
    )


class SwiGLU(nnx.Module):
    """Gated feed-forward layer, down(act(gate x) * up x), without biases (Shazeer 2020)."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate = linear(features, hidden, ("embed", "mlp"), **options)
        self.up = linear(features, hidden, ("embed", "mlp"), **options)
        self.down = linear(hidden, features, ("mlp", "embed"), **options)

    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        """Applies the layer to each position."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Stack(nnx.Module):
    """`depth` blocks of one kind, stored as one block whose parameters have a leading "layers" axis, run by `jax.lax.scan`.

    One block is traced and compiled whatever the depth. `make_block` takes the rngs and returns a block.
    """

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs):
        if depth < 1:
            raise ValueError(f"A stack needs at least one block, got depth={depth}.")
        self.depth = depth
        self.blocks = nnx.vmap(make_block, in_axes=0, out_axes=0, axis_size=depth)(rngs.fork(split=depth))
        for _, variable in nnx.iter_graph(self.blocks):
            if isinstance(variable, nnx.Param):
                names = variable.get_metadata().get("axes", (None,) * (len(variable.shape) - 1))
                variable.set_metadata(axes=("layers", *names))

    def cut(self) -> list[Any] | None:
        """Returns the blocks one by one, to be used inside a loop, where that is worth a copy of their weights; else None.

        On a CPU, a scan copies each layer's weights out of the stack before it multiplies by them, which for one token costs
        more than the product. Cut before the loop they are copied once. Large stacks have no room for that, and on
        accelerators the copy is part of the product.
        """
        graphdef, params = nnx.split(self.blocks)
        size_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        if jax.default_backend() != "cpu" or size_bytes > _LARGEST_CUT_BYTES:
            return None
        return [
            nnx.merge(graphdef, jax.tree.map(lambda leaf, layer=layer: leaf[layer], params))
            for layer in range(self.depth)
        ]

    def scan(
        self,
        apply: Callable[[Any, Any, Any], tuple[Any, Any]],
        carry: PyTree,
        xs: PyTree = None,
        *,
        length: int | None = None,
        remat: Remat | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Runs `apply(block, carry, x) -> (carry, y)` over the first `length` blocks (all by default).

        `xs` are per-layer inputs with a leading axis of `length`; `remat` wraps the scanned body, e.g. `jax.checkpoint`.
        Returns the last carry and the stacked outputs.
        """
        graphdef, params = nnx.split(self.blocks)
        length = self.depth if length is None else length
        whole = length == self.depth

        def body(carry: PyTree, inputs: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            layer, x = inputs
            if not whole:
                layer = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), params)
            if remat:
                carry = jax.tree.map(lambda leaf: checkpoint_name(leaf, BLOCK_INPUT), carry)
            return apply(nnx.merge(graphdef, layer), carry, x)

        # Some of the blocks are looked up one by one: cutting them off the stack would copy the weights of them all.
        layers = params if whole else jnp.arange(length)
        return jax.lax.scan(remat(body) if remat else body, carry, (layers, xs), length=length)

    def chosen(self, numbers: Sequence[int], apply: Callable[[Any, Any], PyTree], xs: PyTree) -> PyTree:
        """Returns `apply(block, x)` of the blocks with these numbers (from 0), each with its own x, all at once.

        `xs` has a leading axis of `len(numbers)`, and so has the result.
        """
        graphdef, params = nnx.split(self.blocks)
        if tuple(numbers) != tuple(range(self.depth)):
            index = np.asarray(numbers)
            params = jax.tree.map(lambda leaf: leaf[index], params)
        return jax.vmap(lambda params, x: apply(nnx.merge(graphdef, params), x))(params, xs)
