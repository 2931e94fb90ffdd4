"""Multi-head attention for short sequences on TPU, forward and backward as one Pallas kernel each.

Shapes: S sequences, N tokens, h heads of d features, D = h d; g heads are handled at once.

A program of a kernel reads whole rows of a few sequences, [q, k, v] as they leave the qkv product, so that nothing is
split, transposed or padded in memory; the gradient is written in the same form.

Arrays in a TPU's vector memory have 128 lanes. A head that is narrower is not cut out of them. Instead the queries of
the g heads that share 128 lanes are stacked as g N rows, where each copy keeps the lanes of its head and is zero in the
others. One product over all lanes then gives the scores of g heads, one softmax serves them all, and what comes back
from the other products is summed or picked by lanes. A head that crosses a border of 128 lanes is handled by itself.

Scores are held transposed, keys x queries. The softmax then reduces over rows, which is a plain vector operation, and
of the five products of the backward pass only one needs a transposed operand. The softmax is computed in float32 with
the maximum subtracted. The backward pass computes the probabilities anew; only qkv and the validity are saved for it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

PerDevice = Callable[[Callable[..., Any]], Callable[..., Any]]  # makes a function run on each device's own sequences

_LANES, _ROWS = 128, 8  # of a tile of a TPU's vector memory
_NOT_SEEN = -1e30  # is added to scores of invalid keys; it is finite, so that rows without valid keys give no NaN
_BLOCKS = 10 << 20  # bytes that the blocks of a program may take; each is held twice
_VMEM = 64 << 20  # bytes of vector memory that the compiler may use
_MAX_TOKENS = 320
_ONE_SEQUENCE = 12.25 * 2**20  # bytes that the blocks of one sequence may take backward; a v4 has 16 MiB in all
_HEAD_DIMS = (16, 128)
# Which axis of either factor a product sums over.
_NT, _NN, _TN = ((1,), (1,)), ((1,), (0,)), ((0,), (0,))


def unsupported(*, tokens: int, width: int, heads: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Says why the kernels cannot serve sequences of `tokens` x `width`, or returns None where they can."""
    smallest, largest = _HEAD_DIMS
    if width % 64:
        return f"the width, {width}, is not a multiple of 64"
    if not smallest <= width // heads <= largest:
        return f"heads have {width // heads} features, not {smallest} to {largest}"
    if tokens > _MAX_TOKENS:
        return f"a sequence has {tokens} tokens, more than {_MAX_TOKENS}"
    if 2 * 7 * tokens * width * jnp.dtype(dtype).itemsize > _ONE_SEQUENCE:
        return f"{tokens} tokens of {width} features in {jnp.dtype(dtype).name} exceed the vector memory"
    return None


def attend(
    qkv: Float[Array, "S N 3D"],
    bias: Float[Array, " 3D"],
    valid: Bool[Array, "S N"] | None,
    *,
    heads: int,
    per_device: PerDevice = lambda function: function,
    interpret: bool = False,
) -> Float[Array, "S N D"]:
    """Attends to the tokens that are valid, by default to all.

    qkv lacks its bias, whose gradient, a sum over all tokens, comes out of the kernel too. The arrays of every call
    that `per_device` distributes have the sequences first. `interpret` runs the kernels without a TPU, slowly.
    """
    seen = None if valid is None else jnp.where(valid, 0.0, _NOT_SEEN).astype(jnp.float32)[..., None]
    return _attend(qkv, bias, seen, heads, per_device, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(qkv, bias, seen, heads, per_device, interpret):
    return _save(qkv, bias, seen, heads, per_device, interpret)[0]


def _save(qkv, bias, seen, heads, per_device, interpret):
    qkv = qkv + bias.astype(qkv.dtype)[None, None]  # XLA makes this a part of the product
    run = per_device(functools.partial(_run, _forward, heads=heads, interpret=interpret))
    return run(qkv, seen), (qkv, seen)


def _pull(heads, per_device, interpret, saved, gradient):
    qkv, seen = saved
    run = per_device(functools.partial(_run, _backward, heads=heads, interpret=interpret))
    d_qkv, d_bias = run(qkv, seen, gradient)
    return d_qkv, d_bias.sum((0, 1)), None


_attend.defvjp(_save, _pull)


def _run(kernel, qkv, seen, *gradient, heads, interpret):
    """Calls a kernel on the sequences of one device."""
    count, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = 3 * width if gradient else width
    columns = [x.shape[2] for x in (qkv, *gradient)]
    size = qkv.dtype.itemsize * tokens * (sum(columns) + out)  # bytes of a sequence
    sequences = next(n for n in range(max(1, min(count, _BLOCKS // (2 * size))), 0, -1) if count % n == 0)
    programs = count // sequences
    arrays = [qkv, *gradient] if seen is None else [seen, qkv, *gradient]
    out_shape: Any = jax.ShapeDtypeStruct((count, tokens, out), qkv.dtype)
    out_specs: Any = pl.BlockSpec((sequences, tokens, out), lambda i: (i, 0, 0))
    if gradient:
        out_shape = (out_shape, jax.ShapeDtypeStruct((programs, _ROWS, out), jnp.float32))
        out_specs = (out_specs, pl.BlockSpec((1, _ROWS, out), lambda i: (i, 0, 0)))
    return pl.pallas_call(
        functools.partial(kernel, head_dim=width // heads, masked=seen is not None),
        grid=(programs,),
        in_specs=[pl.BlockSpec((sequences, *x.shape[1:]), lambda i: (i, 0, 0)) for x in arrays],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM),
        cost_estimate=pl.CostEstimate(
            flops=2 * (5 if gradient else 2) * count * tokens**2 * width,
            transcendentals=count * heads * tokens**2,
            bytes_accessed=count * size,
        ),
        interpret=interpret,
        name=f"attention_{'backward' if gradient else 'forward'}_{heads}x{width // heads}",
    )(*arrays)


def _forward(*refs, head_dim, masked):
    seen_ref, qkv_ref, out_ref = refs if masked else (None, *refs)
    tokens, width = out_ref.shape[1:]

    def one(s, _):
        seen = seen_ref[s] if masked else None
        out = _Columns()
        for group in _groups(tokens, width, head_dim):
            q, k, v = (qkv_ref[s, :, i * width + group.first : i * width + group.end] for i in range(3))
            p = _probabilities(k, _stack(q, group), seen, head_dim)
            out.add(group.first, _unstack(_dot(p.astype(v.dtype), v, _TN), group))
        out.write(out_ref, s, 0)
        return 0

    jax.lax.fori_loop(0, qkv_ref.shape[0], one, 0)


def _backward(*refs, head_dim, masked):
    seen_ref, qkv_ref, g_ref, d_ref, d_bias_ref = refs if masked else (None, *refs)
    tokens, width = g_ref.shape[1:]
    scale = head_dim**-0.5
    d_bias_ref[...] = jnp.zeros(d_bias_ref.shape, d_bias_ref.dtype)

    def one(s, _):
        seen = seen_ref[s] if masked else None
        d_q, d_k, d_v = _Columns(), _Columns(), _Columns()
        for group in _groups(tokens, width, head_dim):
            q, k, v = (qkv_ref[s, :, i * width + group.first : i * width + group.end] for i in range(3))
            q, g = _stack(q, group), _stack(g_ref[s, :, group.first : group.end], group)
            p = _probabilities(k, q, seen, head_dim)
            p_dp = p * _dot(v, g, _NT)
            d_scores = (p_dp - p * p_dp.sum(axis=0, keepdims=True)).astype(q.dtype)
            d_q.add(group.first, _unstack(_dot(d_scores, k, _TN), group) * scale)
            d_k.add(group.first, _dot(d_scores, q, _NN) * scale)
            d_v.add(group.first, _dot(p.astype(g.dtype), g, _NN))
        for i, columns in enumerate((d_q, d_k, d_v)):
            columns.write(d_ref, s, i * width)
            columns.add_rows_to(d_bias_ref, i * width)
        return 0

    jax.lax.fori_loop(0, qkv_ref.shape[0], one, 0)


class _Group(NamedTuple):
    """Heads that are handled at once, within the lanes that they share."""

    first: int  # lane
    end: int
    heads: list[tuple[int, int]]  # the first lane of each, and its end, counted from `first`


def _groups(tokens: int, width: int, head_dim: int) -> list[_Group]:
    groups: list[_Group] = []
    for head in range(0, width, head_dim):
        first, end = head // _LANES * _LANES, min(-(-(head + head_dim) // _LANES) * _LANES, width)
        lanes = (head - first, head - first + head_dim)
        # Rows that fill no tile could be stacked only by moving them.
        if groups and groups[-1][:2] == (first, end) and tokens % _ROWS == 0:
            groups[-1].heads.append(lanes)
        else:
            groups.append(_Group(first, end, [lanes]))
    return groups


def _owns(shape: tuple[int, ...], head: tuple[int, int]) -> jax.Array:
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lane >= head[0]) & (lane < head[1])


def _stack(x: jax.Array, group: _Group) -> jax.Array:
    """Maps [N, lanes] to [g N, lanes]: a copy for each head, with the lanes of all others zeroed."""
    if group.heads == [(0, x.shape[1])]:
        return x
    wide = x.astype(jnp.float32)  # not every TPU selects in bfloat16
    return jnp.concatenate([jnp.where(_owns(x.shape, head), wide, 0.0) for head in group.heads]).astype(x.dtype)


def _unstack(x: jax.Array, group: _Group) -> jax.Array:
    """Maps [g N, lanes] to [N, lanes]: of each copy the lanes of its head, and zeros where there is no head."""
    if group.heads == [(0, x.shape[1])]:
        return x
    parts = jnp.split(x, len(group.heads))
    picked = jnp.zeros_like(parts[0])
    for part, head in zip(parts, group.heads, strict=True):
        picked = jnp.where(_owns(part.shape, head), part, picked)
    return picked


def _probabilities(k: jax.Array, q: jax.Array, seen: jax.Array | None, head_dim: int) -> jax.Array:
    """Computes the softmax over keys, [N, g N] float32."""
    scores = _dot(k, q, _NT)
    if seen is not None:
        scores = scores + seen
    e = jnp.exp2((scores - scores.max(axis=0, keepdims=True)) * (head_dim**-0.5 * math.log2(math.e)))
    return e * (1.0 / e.sum(axis=0, keepdims=True))


def _dot(a: jax.Array, b: jax.Array, axes: tuple[tuple[int], tuple[int]]) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)


class _Columns:
    """Sums of the results of all groups, as float32 columns of 128 lanes; groups of wide heads overlap."""

    def __init__(self):
        self.parts: dict[int, jax.Array] = {}

    def add(self, first: int, values: jax.Array) -> None:
        for i in range(0, values.shape[1], _LANES):
            part, lane = values[:, i : i + _LANES], first + i
            self.parts[lane] = self.parts[lane] + part if lane in self.parts else part

    def write(self, ref: Any, sequence: Any, offset: int) -> None:
        for lane, part in self.parts.items():
            ref[sequence, :, offset + lane : offset + lane + part.shape[1]] = part.astype(ref.dtype)

    def add_rows_to(self, ref: Any, offset: int) -> None:
        """Adds the sums over the tokens; 8 partial sums where rows fill tiles, which need no reduction in a tile."""
        for lane, part in self.parts.items():
            rows = (
                part.reshape(-1, _ROWS, part.shape[1]).sum(0) if len(part) % _ROWS == 0 else part.sum(0, keepdims=True)
            )
            ref[0, : len(rows), offset + lane : offset + lane + rows.shape[1]] += rows
