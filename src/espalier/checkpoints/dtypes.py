"""The number types of safetensors files, and which of them torch computes with."""

from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Bytes of one item and torch's name of each safetensors dtype that is read and written.
ITEM_BYTES = {
    "C64": 8, "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1, "F4": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
TORCH_NAMES = {
    "C64": "complex64", "F64": "float64", "I64": "int64", "U64": "uint64", "F32": "float32", "I32": "int32",
    "U32": "uint32", "F16": "float16", "BF16": "bfloat16", "I16": "int16", "U16": "uint16", "I8": "int8",
    "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
ITEM_NUMBERS = {"F4": 2}  # numbers that an item of torch's holds, where they are more than one


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in torch of a tensor of a header's dtype and shape: packed numbers lie along the last one."""
    return (*shape[:-1], shape[-1] // ITEM_NUMBERS[dtype]) if dtype in ITEM_NUMBERS else shape


def only_stored(dtype: str) -> bool:
    """Whether tensors of a header's dtype are for storing: torch copies and converts them, no more."""
    return dtype.startswith(("F8", "F4"))


def not_finite(tensor: "torch.Tensor") -> int:
    """Return how many numbers are NaN or infinite."""
    import torch

    if tensor.element_size() == 1:  # float8, float4; torch has isfinite() for those that have an infinity
        return int((~tensor.isfinite() if tensor.dtype == torch.float8_e5m2 else tensor.isnan()).sum())
    # The extremes are NaN or infinite if any number is, and found 20 times faster than isfinite() does in bf16.
    if all(map(isfinite, map(float, tensor.aminmax()))):
        return 0
    return int((~tensor.isfinite()).sum())
