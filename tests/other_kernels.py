"""A pytest plugin: torch as on a machine with other kernels (`pytest -p tests.other_kernels`).

On another instruction set, or with other threads, a sum is taken in another order and the tail of a vector by other
code. Which order depends on the operation and on shapes and strides, so two computations of one value that are
bit-equal here may differ there by roundings. Here each operation whose order is its own gets its result changed by up
to a rounding an entry, by a pattern drawn from the operation and its inputs' shapes: same kernel and same shapes stay
bit-equal, all else does not. A test that passes without the plugin and fails with it may hold by the luck of a kernel.

It is harsher than any machine: a norm's kernel, say, works row by row, whatever the number of rows.
"""

import zlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Sums, and functions that vector units compute otherwise. What IEEE rounds once (+, *, /, sqrt) is the same everywhere.
OTHERWISE = frozenset(
    [
        "addmm",
        "mm",
        "bmm",
        "baddbmm",
        "addmv",
        "mv",
        "dot",
        "convolution",
        "convolution_backward",
        "addbmm",
        "_addmm_activation",
        "native_layer_norm",
        "native_layer_norm_backward",
        "native_group_norm",
        "native_group_norm_backward",
        "native_batch_norm",
        "_fused_rms_norm",
        "_fused_rms_norm_backward",
        "native_batch_norm_backward",
        "_native_batch_norm_legit",
        "sum",
        "mean",
        "var",
        "var_mean",
        "std",
        "norm",
        "linalg_vector_norm",
        "logsumexp",
        "cumsum",
        "prod",
        "_softmax",
        "_softmax_backward_data",
        "_log_softmax",
        "_log_softmax_backward_data",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "exp",
        "log",
        "log1p",
        "expm1",
        "sin",
        "cos",
        "tanh",
        "sigmoid",
        "erf",
        "pow",
        "rsqrt",
        "gelu",
        "gelu_backward",
        "silu",
        "silu_backward",
        "softplus",
        "log_sigmoid_forward",
        "tanh_backward",
        "sigmoid_backward",
        "addcmul",
        "addcdiv",
        "lerp",
        "nll_loss_forward",
        "embedding_dense_backward",
        "mse_loss",
        "binary_cross_entropy_with_logits",
        "_grouped_mm",
        "grid_sampler_2d",
        "upsample_bilinear2d",
    ]
)


class OtherKernels(TorchDispatchMode):
    """Changes results by up to a rounding an entry, by a pattern of the operation and its inputs' shapes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name.rstrip("_") not in OTHERWISE and name not in OTHERWISE:
            return result
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        for number, tensor in enumerate(tree_flatten(result)[0]):
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.is_floating_point():
                continue
            if tensor.device.type != "cpu" or any(isinstance(t, FakeTensor) for t in inputs) or not tensor.numel():
                continue
            shapes = [(tuple(t.shape), t.stride()) for t in inputs]
            _round_otherwise(tensor, zlib.crc32(repr((func.__name__, number, shapes)).encode()))
        return result


def _round_otherwise(tensor, seed):
    """Multiply by 1 - eps, 1 or 1 + eps, drawn an entry; zeros and infinities stay."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(-1, 2, tensor.shape, generator=generator)
    eps = torch.finfo(tensor.dtype).eps
    with torch.no_grad():
        tensor.detach().mul_((1 + signs.to(torch.float64) * eps).to(tensor.dtype))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call():
    with OtherKernels():
        yield
