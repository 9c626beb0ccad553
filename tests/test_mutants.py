"""Every coding exercise against small changes of its own reference answer, made automatically: none may pass its check.

A mutant that passes shows what the check does not look at. Some mutants are right answers too (they are *equivalent*);
these are listed by hand, each with the reason.
"""

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpteach import exercises
from dpteach.exercises import core, loop
from dpteach.mechanism import per_sample_gradients

CODING = [e for e in exercises.every() if callable(e.reference)]
LIMIT = 0.3  # seconds a call: an endless mutant is common, a slow one that is right is not

# Exercise: what was changed -> why the change is right, too.
EQUIVALENT: dict[str, dict[str, str]] = {
    "1.3": {
        "logits.double() -> logits": "float32 minus float64 is computed in float64",
        "logits.double() -> logits (again)": "the same, for the other operand",
        "…er(1, rows).squeeze(1) -> …er(1, rows).squeeze()": "of one record a number stays, and the subtraction makes a row of it",
    },
    "3.1": {"summed + noise_multiplier * … -> summed - noise_multiplier * …": "the noise is symmetric"},
    "3.2": {
        "…nerator=generator) < sample_rate -> …nerator=generator) <= sample_rate": "a float32 draw equals q with probability 2^-24"
    },
    "3.4": {
        "…(model.parameters()).detach() -> …(model.parameters())": "the weights are the same, and so is the next step"
    },
    "5.2": {
        "0.05 -> 0.1": "the learning rate is the learner's choice",
        "0.05 -> 1.05": "the learning rate is the learner's choice",
        "…D(model.parameters(), lr=0.05) -> …D(model.parameters())": "the learning rate has a default",
    },
    "4.1": {"…sses), min=0).mean().item() -> …sses), min=0).mean()": "a tensor of one number is a number, too"},
    "4.2": {"0 -> -1": "zero epochs always fit, so a search that begins by asking for them finds the same"},
    "4.5": {
        "max(0.0, min((epsilon_of_order(a, step_rdp(sigma, q, a), steps, delta) for a in range(2, 64)))) -> max(min((epsilon_of_order(a, step_rdp(sigma, q, a), steps, delta) for a in range(2, 64))), 0.0)": (
            "max does not care for the order"
        )
    },
    "4.7": {
        "float(whole @ np.maximum(0, 1 - np.exp(eps - sums))) -> whole @ np.maximum(0, 1 - np.exp(eps - sums))": (
            "a number of NumPy's is a number, too"
        ),
        "np.convolve(whole, probabilities) -> np.convolve(probabilities, whole)": "a sum does not care for the order",
        "np.maximum(0, 1 - np.exp(eps - sums)) -> np.maximum(1 - np.exp(eps - sums), 0)": "nor does a maximum",
        "whole @ np.maximum(0, 1 - np.exp(eps - sums)) -> np.maximum(0, 1 - np.exp(eps - sums)) @ whole": "nor this sum",
        "np.ones(1) -> 1": "NumPy takes a number for an array of one",
    },
    "4.9": {
        "printed + 0.02 < epsilon(noise_multi… -> printed + 0.02 <= epsilon(noise_multi…": "no claim lies just there"
    },
    "5.4": {
        "0.05 -> 0.1": "the learning rate is the learner's choice",
        "0.05 -> 1.05": "the learning rate is the learner's choice",
        "…D(model.parameters(), lr=0.05) -> …D(model.parameters())": "the learning rate has a default",
    },
    "6.1": {"0 -> -1": "the last model has the names of the first"},
    "6.2": {
        "2 ** 48 -> its first value": "it is a constant",
        "added - taken_off -> taken_off - added": "either of a pair may add",
        "shared(i, j) -> shared(j, i)": "a pair shares one row, whoever asks first",
        "shared(i, j) -> shared(j, i) (again)": "the same",
        "torch.stack(rows) -> rows": "a list of masks is as good",
    },
    "6.5": {
        "2 ** 48 -> its first value": "it is a constant",
        "i < j -> i <= j": "nobody shares with herself, so i is never j",
    },
    "7.2": {
        "'arrays' -> 'syarra' (again)": "the server takes the one ArrayRecord, whatever it is called",
        "'metrics' -> 'scirtem'": "and the one MetricRecord",
        "'who' -> 'ohw'": "and any ConfigRecord with a name",
        "for _ in dpteach.train(model, data, settings, method='opacus'): -> for _ in list(dpteach.train(model, data, settings, method='opacus'))[1:]:": "all steps are trained, whoever looks",
        "for _ in dpteach.train(model, data, settings, method='opacus'): -> for _ in list(dpteach.train(model, data, settings, method='opacus'))[:-1]:": "the same",
        "…odel, data, settings, method='opacus') -> …odel, data, settings)": "the package's own loop costs and hides the same",
    },
    "7.4": {
        "'arrays' -> 'syarra' (again)": "as for 7.2",
        "'metrics' -> 'scirtem'": "as for 7.2",
        "'who' -> 'ohw'": "as for 7.2",
        "for _ in dpteach.train(model, data, settings, method='opacus'): -> for _ in list(dpteach.train(model, data, settings, method='opacus'))[1:]:": "as for 7.2",
        "for _ in dpteach.train(model, data, settings, method='opacus'): -> for _ in list(dpteach.train(model, data, settings, method='opacus'))[:-1]:": "as for 7.2",
        "1 -> 2": "without noise, how eve trains is her own choice",
        "Settings(0.0, C, epochs=1, batch_size… -> Settings(0.0, epochs=1, batch_size…": "the same",
        "node['max-grad-norm'] -> its first value": "the same",
        "run['lr'] -> its first value": "the same",
        "…=run['batch-size'], lr=run['lr'], seed=None) -> …=run['batch-size'], seed=None)": "the same",
        "…odel, data, settings, method='opacus') -> …odel, data, settings)": "the same",
        "…s, method='opacus'): -> …s, method='opacus'):": "the same",
        "…size'], lr=run['lr'], seed=None) -> …size'], lr=run['lr'])": "the same",
    },
    "11.1": {
        "int((log_probabilities >= log_probabilities[secret]).sum()) -> (log_probabilities >= log_probabilities[secret]).sum()": (
            "math.log2 takes a tensor of one number, too"
        )
    },
    "8.4": {
        "found > target_delta -> found >= target_delta": "the end of an interval is never exactly δ",
        "max(0.0, math.log((found - target_delta) / wrong)) -> max(math.log((found - target_delta) / wrong), 0.0)": (
            "max does not care for the order"
        ),
    },
    "8.6": {
        "return as torch.bfloat16": "rounding after the noise is post-processing",
        "return as torch.float16": "the same",
    },
    "8.2": {
        "references - mean -> mean - references": "it is squared",
        "…()).log_prob(target) -> …()).log_prob(target) + 1": "the same on both sides: the difference has none of it",
    },
}


def is_loud(fn) -> bool:
    """What the text of exercise 1.2 asks for, on the models that its check uses."""
    for flip, swap in loop.TURNS:
        model, data = loop.turned(flip, swap)
        x, y = fn(model, data)
        x, y = x.float(), torch.as_tensor(y).long()
        if x.shape != (2,) or x.abs().max() > 2 or y not in (0, 1):
            return False
        loudness = [
            per_sample_gradients(model, F.cross_entropy, *rows).norm(dim=1).max()
            for rows in ((data.X, data.y), (x[None], y.reshape(1)))
        ]
        if loudness[1] < 1.4 * loudness[0]:
            return False
    return True


def moves_the_mean(fn) -> bool:
    """What the text of exercise 3.3 asks for."""
    batch, record = fn()
    joined = torch.cat([batch, record[None]]).double()
    moved = (joined.mean(0) - batch.double().mean(0)).norm()
    return joined.shape[1] == 2 and bool((joined.norm(dim=1) <= 1).all()) and bool(moved >= 0.4999)


def keeps_delta(fn) -> bool:
    """What the text of exercise 4.6 asks for."""
    for n, delta in ((40, 0.1), (25, 0.3)):
        generator = torch.Generator().manual_seed(1)
        draws = [torch.bincount(fn(n, delta, generator).flatten().long(), minlength=n) for _ in range(2000)]
        often = torch.stack(draws).double().mean(0)
        if often.max() > delta + 5 * (delta / 2000) ** 0.5 or often.sum() < 0.8 * n * delta:
            return False
    return True


# Exercises that leave open what to find: there, a mutant passes exactly if it does what the text asks for.
OPEN = {"1.2": is_loud, "3.3": moves_the_mean, "4.6": keeps_delta}

OPERATORS = {
    ast.Add: [ast.Sub, ast.Mult],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div, ast.Add],
    ast.Div: [ast.Mult, ast.FloorDiv],
    ast.FloorDiv: [ast.Div],
    ast.Mod: [ast.FloorDiv],
    ast.Pow: [ast.Mult],
    ast.MatMult: [ast.Mult],
    ast.Lt: [ast.LtE, ast.Gt, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt, ast.GtE],
    ast.Gt: [ast.GtE, ast.Lt, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt, ast.LtE],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
}
NAMES = {
    "sum": ["mean", "prod"],
    "mean": ["sum"],
    "min": ["max"],
    "max": ["min"],
    "amin": ["amax"],
    "amax": ["amin"],
    "argmin": ["argmax"],
    "argmax": ["argmin"],
    "ceil": ["floor"],
    "floor": ["ceil"],
    "randn": ["rand"],
    "rand": ["randn"],
    "double": ["float", "half"],
    "float": ["half"],
    "zeros": ["ones"],
    "ones": ["zeros"],
}
COMMUTE = (ast.Add, ast.Mult)


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of ``node``."""

    def like(**fields) -> ast.AST:
        return type(node)(**{**dict(ast.iter_fields(node)), **fields})

    if isinstance(node, ast.BinOp):
        yield from (like(op=op()) for op in OPERATORS.get(type(node.op), []))
        yield from (node.left, node.right)
        if not isinstance(node.op, COMMUTE):
            yield like(left=node.right, right=node.left)
    elif isinstance(node, ast.BoolOp):
        yield from (like(op=op()) for op in OPERATORS[type(node.op)])
        yield from node.values
    elif isinstance(node, ast.Compare):
        yield from (like(ops=[op(), *node.ops[1:]]) for op in OPERATORS[type(node.ops[0])])
        yield ast.UnaryOp(ast.Not(), node)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, (int, float)):
            yield from (ast.Constant(v) for v in (node.value + 1, node.value - 1, node.value * 2))
        elif isinstance(node.value, str):
            yield ast.Constant("prv" if node.value == "rdp" else node.value[::-1])
    elif isinstance(node, ast.Call):
        for k in range(len(node.keywords)):
            yield like(keywords=node.keywords[:k] + node.keywords[k + 1 :])
            for name in NAMES.get(node.keywords[k].arg or "", []):
                yield like(keywords=[ast.keyword(name, w.value) if j == k else w for j, w in enumerate(node.keywords)])
        for k in range(len(node.args)):
            yield like(args=node.args[:k] + node.args[k + 1 :])
        if len(node.args) > 1:
            yield like(args=[node.args[1], node.args[0], *node.args[2:]])
        if isinstance(node.func, ast.Attribute):
            yield node.func.value  # x.clamp(...) -> x
            for name in NAMES.get(node.func.attr, []):
                yield like(func=ast.Attribute(node.func.value, name, ast.Load()))
            if node.func.attr in ("ceil", "floor"):
                yield like(func=ast.Name("round", ast.Load()))
        elif isinstance(node.func, ast.Name):
            yield from (like(func=ast.Name(name, ast.Load())) for name in NAMES.get(node.func.id, []))
        if node.args and not isinstance(node.args[0], ast.Starred):
            yield node.args[0]  # f(x) -> x
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, (ast.If, ast.While)):
        yield like(test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.For):
        yield like(body=[*node.body, ast.Break()])
        yield from (like(iter=part) for part in parts(node.iter))
    elif isinstance(node, ast.comprehension):
        yield from (like(iter=part) for part in parts(node.iter))
        if node.ifs:
            yield like(ifs=[])
    elif isinstance(node, ast.DictComp):
        yield like(key=node.value, value=node.key)
        yield node.value
    elif isinstance(node, (ast.List, ast.Tuple)) and isinstance(node.ctx, ast.Load) and node.elts:
        yield from (like(elts=node.elts[:k] + node.elts[k + 1 :]) for k in range(len(node.elts)))
        yield like(elts=node.elts[::-1])
    elif isinstance(node, ast.Return) and node.value:
        yield from (
            like(value=ast.BinOp(ast.Constant(2), ast.Mult(), node.value)),
            like(value=ast.UnaryOp(ast.USub(), node.value)),
            like(value=ast.BinOp(node.value, ast.Add(), ast.Constant(1))),
        )
    if isinstance(node, ast.stmt) and not isinstance(node, (ast.Pass, ast.FunctionDef)):
        yield ast.Pass()


def parts(iterable: ast.expr) -> Iterator[ast.expr]:
    """All but the first and all but the last of what is iterated over."""
    for cut in (ast.Slice(lower=ast.Constant(1)), ast.Slice(upper=ast.Constant(-1))):
        yield ast.Subscript(ast.Call(ast.Name("list", ast.Load()), [iterable], []), cut, ast.Load())


def cast(result, dtype):
    """``result``, or each number in it, by way of a coarser type."""
    if isinstance(result, torch.Tensor):
        return result.to(dtype)
    if isinstance(result, dict):
        return {key: cast(value, dtype) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return type(result)(cast(value, dtype) for value in result)
    return torch.tensor(result, dtype=torch.float64).to(dtype).item()


def casts(result) -> list[torch.dtype]:
    """The coarser types that can change such a result."""
    if isinstance(result, (list, tuple, dict)):
        return casts(next(iter(result.values() if isinstance(result, dict) else result)))
    if isinstance(result, torch.Tensor):
        return [d for d in (torch.float32, torch.float16, torch.bfloat16, torch.int64) if d != result.dtype]
    return [] if isinstance(result, int) else [torch.float16, torch.bfloat16, torch.int64]


class Replace(ast.NodeTransformer):
    """The tree with one node replaced: the ``index``-th that :func:`sites` counts."""

    def __init__(self, index: int, new: Callable[[ast.AST], ast.AST]) -> None:
        self.index, self.new, self.seen = index, new, -1

    def visit(self, node):
        self.seen += 1
        return ast.copy_location(self.new(node), node) if self.seen == self.index else self.generic_visit(node)


def sites(tree: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []

    class Count(ast.NodeTransformer):
        def visit(self, node):
            found.append(node)
            return self.generic_visit(node)

    Count().visit(copy.deepcopy(tree))
    return found


def source_tree(fn: Callable) -> ast.Module:
    tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    body = tree.body[0].body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del body[0]  # a docstring has no effect
    return tree


def function_of(tree: ast.Module, fn: Callable, **names) -> Callable:
    scope = {**fn.__globals__, **names}
    exec(compile(ast.fix_missing_locations(tree), f"<a mutant of {fn.__name__}>", "exec"), scope)
    return scope[fn.__name__]


def line(node: ast.AST) -> str:
    return ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).partition("\n")[0]


def change(old: str, new: str) -> str:
    """``old -> new``, without most of what they have in common."""
    ends = [0, 0]
    for side, (a, b) in enumerate(((old, new), (old[::-1], new[::-1]))):
        while ends[side] < min(len(a), len(b)) - ends[0] * side and a[ends[side]] == b[ends[side]]:
            ends[side] += 1
    start, end = max(ends[0] - 20, 0), max(ends[1] - 20, 0)
    return " -> ".join("…" * (start > 0) + part[start : len(part) - end] + "…" * (end > 0) for part in (old, new))


def first_values(exercise: core.Exercise, tree: ast.Module) -> dict[int, object]:
    """What the expressions of the reference answer are worth when they are first computed, on the first input.

    The index -1 is for the whole result.
    """
    seen: dict[int, object] = {}
    parameters = {argument.arg for argument in tree.body[0].args.args}

    def once(fn: Callable) -> Callable:
        calls = iter([fn])
        return lambda *args: next(calls)(*args)  # the second call raises: the first is all that is wanted

    def keep(index, value):
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if isinstance(value, tuple) and any(isinstance(part, torch.optim.Optimizer) for part in value):
            return value  # whoever copies Opacus' optimizer wraps step() of its class once more, for all
        if index not in seen and (index < 0 or number or isinstance(value, torch.Tensor)):
            seen[index] = copy.deepcopy(value.detach() if isinstance(value, torch.Tensor) else value)
        return value

    core.examine(exercise, once(lambda *args: keep(-1, exercise.reference(*args))))
    for index, node in enumerate(sites(tree)):
        computed = isinstance(node, (ast.BinOp, ast.Call, ast.Subscript, ast.IfExp))
        if (computed or isinstance(node, ast.Name) and node.id in parameters) and not isinstance(
            getattr(node, "ctx", None), ast.Store
        ):
            kept = Replace(
                index, lambda n, index=index: ast.Call(ast.Name("_keep", ast.Load()), [ast.Constant(index), n], [])
            )
            core.examine(exercise, once(function_of(kept.visit(copy.deepcopy(tree)), exercise.reference, _keep=keep)))
    return seen


def mutants(exercise: core.Exercise) -> dict[str, Callable]:
    """What was changed -> the changed answer."""
    tree, found, sources = source_tree(exercise.reference), {}, set()
    first = first_values(exercise, tree)

    def add(index: int, new: ast.AST, label: str, _call=None) -> None:
        mutant = Replace(index, lambda _: copy.deepcopy(new)).visit(copy.deepcopy(tree))
        source = ast.unparse(ast.fix_missing_locations(mutant)) + (label if _call else "")
        if source in sources or source == ast.unparse(tree):
            return
        sources.add(source)
        while label in found:  # the same change at another place
            label += " (again)"
        found[label] = function_of(mutant, exercise.reference, _call=_call)

    def call(*args) -> ast.Call:
        return ast.Call(ast.Name("_call", ast.Load()), list(args), [])

    for index, node in enumerate(sites(tree)):
        for new in changes(node):
            add(index, new, change(line(node), line(new)))
        if index in first:
            add(index, call(), f"{line(node)} -> its first value", lambda value=first[index]: copy.deepcopy(value))
        if isinstance(node, ast.Return) and -1 in first:
            add(index, ast.Return(call()), "return the first result", lambda: copy.deepcopy(first[-1]))
            for dtype in casts(first[-1]):
                add(
                    index,
                    ast.Return(call(node.value)),
                    f"return as {dtype}",
                    lambda value, dtype=dtype: cast(value, dtype),
                )
    return found


@pytest.mark.parametrize("exercise", CODING, ids=[e.id for e in CODING])
def test_no_mutant_of_the_reference_answer_passes(exercise, monkeypatch):
    tried, passed = mutants(exercise), []
    equivalent = EQUIVALENT.get(exercise.id, {})
    if exercise.id in OPEN:
        equivalent = [what for what, mutant in tried.items() if does(OPEN[exercise.id], mutant)]
    for what, mutant in tried.items():
        monkeypatch.setattr(core, "TIME_LIMIT", 10.0 if what in equivalent else LIMIT)
        if core.examine(exercise, mutant).passed:
            passed.append(what)
    print(
        f"{exercise.id}: {len(tried)} mutants; passed, and may:", *sorted(set(passed) & set(equivalent)), sep="\n    "
    )
    print("passed, and may not:", *sorted(set(passed) - set(equivalent)), sep="\n    ")
    assert len(tried) >= 12
    assert sorted(passed) == sorted(equivalent)  # a listed one that does not pass, or is not tried, is no exception


def does(what_is_asked: Callable, mutant: Callable) -> bool:
    try:
        return what_is_asked(mutant)
    except Exception:  # it returns something else, or raises
        return False
