"""Arithmetic, comparisons and activations of ML Programs, element by element.

Sources: coremltools/converters/mil/mil/ops/defs, elementwise_unary.py, elementwise_binary.py and activation.py of
iOS15 and iOS17, and control_flow.py (select).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from mobilekit.runtimes._mil_constants import along
from mobilekit.runtimes._mil_table import Arguments, Table

OPERATORS = Table()

OPERATORS.simple(
    {
        "abs": torch.abs,
        "acos": torch.acos,
        "asin": torch.asin,
        "atan": torch.atan,
        "atanh": torch.atanh,
        "ceil": torch.ceil,
        "cos": torch.cos,
        "cosh": torch.cosh,
        "erf": torch.erf,
        "exp": torch.exp,
        "exp2": torch.exp2,
        "floor": torch.floor,
        "identity": torch.Tensor.clone,
        "logical_not": torch.logical_not,
        "round": torch.round,
        "sign": torch.sign,
        "sin": torch.sin,
        "sinh": torch.sinh,
        "sqrt": torch.sqrt,
        "square": torch.square,
        "tan": torch.tan,
        "tanh": torch.tanh,
        "relu": F.relu,
        "relu6": F.relu6,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "softplus": lambda x: torch.logaddexp(x, torch.zeros(())),
        "softsign": F.softsign,
    }
)
OPERATORS.simple(
    {
        "add": torch.add,
        "equal": torch.eq,
        "floor_div": torch.floor_divide,
        "greater": torch.gt,
        "greater_equal": torch.ge,
        "less": torch.lt,
        "less_equal": torch.le,
        "logical_and": torch.logical_and,
        "logical_or": torch.logical_or,
        "logical_xor": torch.logical_xor,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "mod": torch.remainder,
        "mul": torch.mul,
        "not_equal": torch.ne,
        "pow": torch.pow,
        "real_div": torch.true_divide,
        "sub": torch.sub,
    },
    "x y",
)


@OPERATORS.operator("cast", "x dtype")
def cast(given: Arguments) -> torch.Tensor:
    """The values in another type: the evaluator converts every result to the type that the program declares for it."""
    return given.tensor()


@OPERATORS.operator("clip", "x alpha beta")
def clip(given: Arguments) -> torch.Tensor:
    """min(max(x, alpha), beta)."""
    return torch.clamp(given.tensor(), given.number("alpha"), given.number("beta"))


@OPERATORS.operator("threshold", "x alpha")
def threshold(given: Arguments) -> torch.Tensor:
    """max(x, alpha)."""
    return torch.clamp(given.tensor(), min=given.number("alpha"))


@OPERATORS.operator("inverse", "x epsilon")
def inverse(given: Arguments) -> torch.Tensor:
    """1 / (x + epsilon)."""
    return torch.reciprocal(given.tensor() + given.number("epsilon", 1e-4))


@OPERATORS.operator("log", "x epsilon")
def logarithm(given: Arguments) -> torch.Tensor:
    """log(x + epsilon)."""
    return torch.log(given.tensor() + given.number("epsilon", 1e-45))


@OPERATORS.operator("rsqrt", "x epsilon")
def reciprocal_root(given: Arguments) -> torch.Tensor:
    """1 / sqrt(x + epsilon)."""
    return torch.rsqrt(given.tensor() + given.number("epsilon", 1e-12))


@OPERATORS.operator("select", "cond a b")
def select(given: Arguments) -> torch.Tensor:
    """`a` where the condition holds, else `b`."""
    return torch.where(given.tensor("cond"), given.tensor("a"), given.tensor("b"))


@OPERATORS.operator("clamped_relu", "x alpha beta")
def clamped_relu(given: Arguments) -> torch.Tensor:
    """min(beta, x) where x is not negative, else min(beta, alpha * x)."""
    return torch.clamp(F.leaky_relu(given.tensor(), given.number("alpha")), max=given.number("beta"))


@OPERATORS.operator("elu", "x alpha")
def elu(given: Arguments) -> torch.Tensor:
    """x where it is positive, else alpha * (exp(x) - 1)."""
    return F.elu(given.tensor(), given.number("alpha"))


@OPERATORS.operator("gelu", "x mode")
def gelu(given: Arguments) -> torch.Tensor:
    """x times the normal distribution function, exactly or in one of two approximations."""
    x, mode = given.tensor(), given.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


@OPERATORS.operator("leaky_relu", "x alpha")
def leaky_relu(given: Arguments) -> torch.Tensor:
    """x where it is not negative, else alpha * x."""
    return F.leaky_relu(given.tensor(), given.number("alpha"))


@OPERATORS.operator("linear_activation", "x alpha beta")
def linear_activation(given: Arguments) -> torch.Tensor:
    """alpha * x + beta."""
    return given.tensor() * given.number("alpha") + given.number("beta")


@OPERATORS.operator("prelu", "x alpha")
def prelu(given: Arguments) -> torch.Tensor:
    """max(x, 0) + alpha * min(x, 0), with an alpha for each channel (axis 1)."""
    x = given.tensor()
    return torch.clamp(x, min=0) + along(given.tensor("alpha"), x, 1) * torch.clamp(x, max=0)


@OPERATORS.operator("scaled_tanh", "x alpha beta")
def scaled_tanh(given: Arguments) -> torch.Tensor:
    """alpha * tanh(beta * x)."""
    return given.number("alpha") * torch.tanh(given.number("beta") * given.tensor())


@OPERATORS.operator("sigmoid_hard", "x alpha beta")
def sigmoid_hard(given: Arguments) -> torch.Tensor:
    """min(max(alpha * x + beta, 0), 1)."""
    return torch.clamp(given.number("alpha") * given.tensor() + given.number("beta"), 0, 1)


@OPERATORS.operator("softplus_parametric", "x alpha beta")
def softplus_parametric(given: Arguments) -> torch.Tensor:
    """alpha * log(1 + exp(beta * x)), with an alpha and a beta for each channel (axis 1)."""
    x = given.tensor()
    inner = along(given.tensor("beta"), x, 1) * x
    return along(given.tensor("alpha"), x, 1) * torch.logaddexp(inner, torch.zeros(()))


@OPERATORS.operator("softmax", "x axis")
def softmax(given: Arguments) -> torch.Tensor:
    """Exponentials over their sum along an axis."""
    return torch.softmax(given.tensor(), given.integer("axis", -1))


@OPERATORS.operator("thresholded_relu", "x alpha")
def thresholded_relu(given: Arguments) -> torch.Tensor:
    """x where it is at least alpha, else 0."""
    x = given.tensor()
    return torch.where(x >= given.number("alpha"), x, torch.zeros(()))
