"""Flat graphs: what a function did to tensors, recorded once and run again without its Python.

A function is run once, for real, while every ATen operation is recorded
(``torch.fx.experimental.proxy_tensor.make_fx``). Tensors that the function reaches by other ways
than its arguments (parameters, buffers, data, an optimizer's moments) are held by reference: a
later run reads what they hold then, and writes to them where the function did. A recorded graph,
run as it is, gives the same bits as the function under the same random state; compiled by
TorchInductor, the same numbers up to rounding, with the same draws.
"""

from __future__ import annotations

import copy
import linecache
import math
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.utils import _pytree as pytree

Call = Callable[..., Any]

unrecorded = disable_proxy_modes_tracing
"""A context within a recorded function, in which tensors are made that later runs read."""


class Untraceable(RuntimeError):
    """A function whose operations cannot be recorded; says at which line and why."""

    @classmethod
    def because(cls, error: Exception) -> Untraceable:
        """The sentence for an error that recording ran into."""
        reason = _first_line(error)
        if "get value out of a tracing tensor" in reason:
            reason = "what it does depends on the value of a tensor"
        return cls(f"{line_of(error)}: {reason}" if line_of(error) else reason)


class Graph:
    """The operations of one run of a function; made by :func:`record`.

    Calling it with tensors of the shapes that it was recorded with runs the operations as they
    were recorded, in the present random state, without gradients.

    Attributes:
        module: the operations; takes the captured tensors, then the inputs.
        captured: tensors that the function reached by itself, in a fixed order; read, and where
            the function wrote to them written, at each call.
    """

    def __init__(self, module: fx.GraphModule, captured: list[Tensor], structure: Any) -> None:
        self.module, self.captured, self._structure = module, captured, structure

    def __call__(self, *inputs: Tensor) -> Any:
        with torch.no_grad():
            return self._structure(self.module(*self.captured, *inputs))

    def __len__(self) -> int:
        """Number of operations."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)

    def shapes(self) -> list[Any]:
        """The operations and the shapes of what they take and give, in order."""
        nodes = [(node.op, node.target, _shape(node)) for node in self.module.graph.nodes]
        return [*nodes, *(tensor.shape for tensor in self.captured)]

    @property
    def mutated(self) -> list[Tensor]:
        """The captured tensors that a run writes to."""
        held = dict(zip(_placeholders(self.module.graph), self.captured, strict=False))
        written = (_storage_of(node) for node in _written(self.module.graph))
        return [held[node] for node in dict.fromkeys(written) if node in held]

    def first(self, count: int) -> Graph:
        """The same graph with the first ``count`` outputs only, a tuple."""
        graph = copy.deepcopy(self.module.graph)
        output = graph.output_node()
        output.args = (tuple(cast(Sequence[Any], output.args[0])[:count]),)
        return Graph(fx.GraphModule(self.module, graph), self.captured, tuple)

    def compile(self, *inputs: Tensor) -> Call:
        """The graph as one program of TorchInductor; on CUDA, a CUDA graph on top of it.

        Draws come from torch's generators in the recorded order. Takes seconds.

        Args:
            inputs: example inputs, such as those of the call that was recorded.

        Raises:
            Untraceable: the compiler refused the graph, or there is none on this machine.
        """
        from torch import _inductor

        graph = copy.deepcopy(self.module.graph)
        _keep_draws(graph)
        _compute_numbers_once(graph)
        # What recording noted of the tensors belongs to other runs.
        for node in graph.nodes:
            node.meta.clear()
        module = fx.GraphModule(self.module, graph)
        held = [*self.captured, *inputs]
        try:
            # The compiler warns of its own code and of this machine.
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                program = cast(Any, _inductor).compile(
                    module, held, options={"fallback_random": True}
                )
        except Exception as error:  # whatever a compiler, or its absence, may raise
            raise Untraceable(_first_line(error)) from error
        captured, structure = self.captured, self._structure
        # A number that lies on the host would be the same at each replay.
        if held and all(tensor.is_cuda for tensor in held):
            program = CudaGraph(program, captured, self.mutated)

        def run(*inputs: Tensor) -> Any:
            with torch.no_grad():
                return structure(program(*captured, *inputs))

        return run


class CudaGraph:
    """A program captured as one CUDA graph at its first call: one launch instead of hundreds.

    Inputs are copied into tensors of its own; the captured tensors stay where they are, and are
    left by the warm-up as they were. Results of a few numbers, such as losses, are copies; larger
    ones, such as gradients, are overwritten by the next call.

    Args:
        program: takes the captured tensors, then the inputs.
        captured: tensors read and written in place.
        mutated: those of them that a call writes to.
    """

    def __init__(self, program: Call, captured: list[Tensor], mutated: list[Tensor]) -> None:
        self._program, self._captured, self._mutated = program, captured, mutated
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        inputs = tensors[len(self._captured) :]
        if self._graph is None:
            self._capture(inputs)
        assert self._graph is not None
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return [out.clone() if out.numel() <= FEW else out for out in self._outputs]

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        device = next(tensor.device for tensor in [*self._captured, *inputs] if tensor.is_cuda)
        self._inputs = [given.to(device).clone() for given in inputs]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        before = Snapshot(self._mutated)
        with torch.cuda.stream(stream):
            for _ in range(3):  # lazy initialization must be over before the capture
                self._program(*self._captured, *self._inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        before.restore()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._outputs = self._program(*self._captured, *self._inputs)


class Snapshot:
    """What tensors hold, and the random state of the CPU and of their devices, to be put back."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._before = [tensor.clone() for tensor in self._tensors]
        self._random = torch.get_rng_state()
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._cuda_random = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        for tensor, before in zip(self._tensors, self._before, strict=True):
            tensor.copy_(before)
        torch.set_rng_state(self._random)
        for device, state in self._cuda_random.items():
            torch.cuda.set_rng_state(state, device)


def record(function: Call, *inputs: Tensor) -> tuple[Any, Graph]:
    """Run a function for real and record its operations: (what it returned, graph).

    Args:
        function: takes the inputs; returns a tree of tensors and constants. It may write to
            tensors in place and run backward passes.
        inputs: tensors of the shapes and dtypes that the graph is for.

    Raises:
        Untraceable: the function asked for the value of a tensor that depends on its inputs,
            its parameters or a draw, or did what cannot be recorded.
    """
    result: Any = None
    leaves: list[Any] = []
    spec: Any = None

    def flat(*tensors: Tensor) -> list[Tensor]:
        nonlocal result, leaves, spec
        result = function(*tensors)
        leaves, spec = pytree.tree_flatten(result)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    try:
        # The engine's own threads would run the backward pass unrecorded.
        with torch.autograd.set_multithreading_enabled(False):
            module = make_fx(flat, tracing_mode="real")(*inputs)
    except Exception as error:  # user code runs in there
        raise Untraceable.because(error) from error

    constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

    def structure(outputs: Sequence[Tensor]) -> Any:
        given = iter(outputs)
        filled = (
            next(given) if tensor else constant
            for tensor, constant in zip(is_tensor, constants, strict=True)
        )
        return pytree.tree_unflatten(list(filled), spec)

    captured = _lift(module)
    return result, Graph(module, captured, structure)


def _lift(module: fx.GraphModule) -> list[Tensor]:
    """Make inputs, in front of the others, of the tensors that a graph holds as attributes.

    A constant written in the function, such as ``torch.tensor(0.5)``, is copied before it is used
    and stays a constant.
    """
    graph = module.graph
    found: dict[int, tuple[Tensor, fx.Node]] = {}
    first = next(iter(graph.nodes))
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        tensor = getattr(module, cast(str, node.target))
        if not isinstance(tensor, Tensor) or all(_is_lift(user) for user in node.users):
            continue
        if id(tensor) not in found:
            with graph.inserting_before(first):
                found[id(tensor)] = tensor, graph.placeholder(f"captured_{len(found)}")
        node.replace_all_uses_with(found[id(tensor)][1])
        graph.erase_node(node)
    module.recompile()
    return [tensor for tensor, _ in found.values()]


def _keep_draws(graph: fx.Graph) -> None:
    """Write ``bernoulli`` as torch computes it: the compiler would compare uniform numbers instead,
    which in double precision are other draws from the same random state."""
    aten = torch.ops.aten
    for node in [n for n in graph.nodes if n.target is aten.bernoulli.default]:
        with graph.inserting_before(node):
            empty = graph.call_function(aten.empty_like.default, (node.args[0],))
            drawn = graph.call_function(aten.bernoulli_.Tensor, (empty, node.args[0]), node.kwargs)
        node.replace_all_uses_with(drawn)
        graph.erase_node(node)


def _compute_numbers_once(graph: fx.Graph) -> None:
    """Keep the compiler from computing a few numbers again for each entry of a large tensor.

    It writes out, in the loop over a parameter, what the loop needs of numbers: a power and a root
    for a bias correction of Adam, for every 16 entries. A strided view makes it store them.
    """
    aten = torch.ops.aten
    for node in list(graph.nodes):
        shape = _shape(node)
        if shape is None or math.prod(shape) > FEW or not _is_pointwise(node):
            continue
        large = [user for user in node.users if math.prod(_shape(user) or ()) > FEW]
        if not large or not node.meta["tensor_meta"].dtype.is_floating_point:
            continue
        stored = node
        for target, arguments in (
            (aten.reshape.default, ([-1],)),
            (aten.clone.default, ()),  # a view has strides of its own
            (aten.as_strided.default, ([math.prod(shape)], [1])),
            (aten.reshape.default, (list(shape),)),
        ):
            with graph.inserting_after(stored):
                stored = graph.call_function(target, (stored, *arguments))
        for user in large:
            user.replace_input_with(node, stored)


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


FEW = 64
"""As many numbers as are rather stored than computed again, and copied than overwritten."""


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    noted = node.meta.get("tensor_meta")
    return None if noted is None or not hasattr(noted, "shape") else tuple(noted.shape)


def _is_lift(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.lift_fresh_copy.default


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _written(graph: fx.Graph) -> Iterator[fx.Node]:
    """Nodes whose tensor another node writes to."""
    for node in graph.nodes:
        if node.op != "call_function" or not hasattr(node.target, "_schema"):
            continue
        for argument, given in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from given if isinstance(given, list | tuple) else [given]


def _storage_of(node: fx.Node) -> fx.Node:
    """The node whose memory a node's tensor is a view of, or which it is itself."""
    while node.op == "call_function" and hasattr(node.target, "_schema"):
        arguments = zip(cast(Any, node.target)._schema.arguments, node.args, strict=False)
        aliased = [given for argument, given in arguments if argument.alias_info is not None]
        if not aliased:
            break
        node = cast(fx.Node, aliased[0])
    return node


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


_HERE = Path(__file__).parent
_LIBRARIES = (
    *(str(Path(cast(str, package.__file__)).parent) for package in (torch, pyro)),
    sysconfig.get_path("stdlib"),
    "<",
)


def line_of(error: BaseException) -> str:
    """Where in the user's code an error arose: ``file:line (code)``; "" if nowhere in it.

    The innermost line that is neither in torch nor in Pyro nor here.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_LIBRARIES) and Path(frame.filename).parent != _HERE:
            code = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"{frame.filename}:{frame.lineno} ({code})"
    return ""
