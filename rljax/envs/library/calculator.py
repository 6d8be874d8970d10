"""A calculator that a model may be given: arithmetic, a few functions, and no way to anything else."""

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

_MAX_CHARS = 400
_MAX_BITS = 4096

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitXor: operator.pow,  # what people write for a power
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_NAMES = {"pi": math.pi, "e": math.e, "tau": math.tau}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        n: getattr(math, n)
        for n in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan")
    },
    **{n: getattr(math, n) for n in ("floor", "ceil", "gcd", "lcm", "degrees", "radians")},
    **{f.__name__: f for f in (abs, min, max, round)},
}
_RUN_ON = re.compile(r"(?<![A-Za-z])[\d.]+(?![eE][+-]?\d)[A-Za-z_]+")
_SIGNS = str.maketrans("\u00d7\u00b7\u00f7\u2212\u2013", "**/--")  # what typesetting makes of * / and -


def calculator(expression: str) -> str:
    """Calculate the value of an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % **, parentheses, and functions such as sqrt, log, sin, min, round, factorial.
    """
    return str(calculate(expression))


def calculate(expression: str) -> int | float:
    """The value of an expression. Integers stay exact up to 4096 bits.

    Raises ValueError, saying what is not allowed or not defined.
    """
    if len(expression) > _MAX_CHARS:
        raise ValueError(f"the expression has {len(expression)} characters; at most {_MAX_CHARS} are allowed")
    if run_on := _RUN_ON.search(expression):  # Python reads `1or 2` with a warning
        raise ValueError(f"a number must not run into letters, as in {run_on[0]!r}")
    try:
        tree = ast.parse(expression.translate(_SIGNS).strip(), mode="eval")
        return _checked(_value(tree.body))
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression[:100]!r} is not an arithmetic expression") from None
    except (OverflowError, TypeError) as error:
        raise ValueError(str(error)) from None


def _value(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _checked(number)
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _apply(op, _value(left), _value(right))
        case ast.Call(func=ast.Name(id="factorial"), args=[argument], keywords=[]):
            return _factorial(_value(argument))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _checked(_FUNCTIONS[name](*(_value(a) for a in arguments)))
    raise ValueError(f"{ast.unparse(node)[:50]!r} is not allowed; use numbers, + - * / // % **, and {_allowed()}")


def _apply(op: ast.operator, left: Any, right: Any) -> Any:
    """Refuses what would be large before it is computed."""
    is_whole_power = isinstance(op, (ast.Pow, ast.BitXor)) and isinstance(left, int) and isinstance(right, int)
    if is_whole_power and abs(left) > 1 and abs(right) * abs(left).bit_length() > _MAX_BITS:
        raise ValueError(f"a power of more than {_MAX_BITS} bits is too large")
    return _checked(_BINARY[type(op)](left, right))


def _factorial(number: Any) -> int:
    if not isinstance(number, int) or not 0 <= number <= 300:
        raise ValueError("factorial needs a whole number from 0 to 300")
    return math.factorial(number)


def _checked(value: Any) -> int | float:
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("the result is no finite real number")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ValueError(f"a number of more than {_MAX_BITS} bits is too large")
    return value


def _allowed() -> str:
    return ", ".join([*_NAMES, *_FUNCTIONS, "factorial"])
