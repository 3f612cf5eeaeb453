"""Finding conv → bn → [add] → [act] in a traced forward, wherever the residual comes from."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from resnet_fused.nn.bn import is_batch_norm
from resnet_fused.nn.trace import has_hooks

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_, F.relu_)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
#: Modules whose result is new memory, and which leave their input as it was.
_PURE_MODULES = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.MaxPool2d, nn.AvgPool2d, nn.Linear)


@dataclass
class Group:
    """Nodes of one graph that become one fused call."""

    conv: fx.Node
    bn: fx.Node
    add: fx.Node | None = None
    residual: fx.Node | None = None
    relu: fx.Node | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        """The group's nodes in the order of computation."""
        return [n for n in (self.conv, self.bn, self.add, self.relu) if n is not None]

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes whose results the group reads: the convolution's input, then the residual."""
        inputs = (self.conv.args[0], self.residual)
        return [n for n in inputs if isinstance(n, fx.Node)]

    @property
    def pattern(self) -> str:
        """The group's parts by name, such as "conv+bn+add+relu"."""
        names = (("conv", self.conv), ("bn", self.bn), ("add", self.add), ("relu", self.relu))
        return "+".join(name for name, node in names if node is not None)


@dataclass
class Matches:
    """What was found in one graph."""

    groups: list[Group] = field(default_factory=list)
    #: Convolutions left alone, by name, with the reason.
    skipped: dict[str, str] = field(default_factory=dict)
    #: Modules that do nothing and were taken out of the graph.
    erased: list[str] = field(default_factory=list)


def match(module: nn.Module, graph: fx.Graph, shared: set[int]) -> Matches:
    """Find the groups in ``module``'s graph; Identity modules are erased from it on the way.

    Args:
        module: the module that was traced.
        graph: its graph; changed in place.
        shared: ids of the modules that stand at several places of the whole model.
    """
    matches = Matches(erased=_erase_identities(module, graph))
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(_module(module, node), nn.Conv2d):
            continue
        found = _match_convolution(module, node, shared)
        if isinstance(found, Group):
            found = _without_hazards(module, found, order)
        if isinstance(found, Group):
            matches.groups.append(found)
        else:
            matches.skipped[str(node.target)] = found
    _share_adds(matches.groups)
    return matches


def _match_convolution(module: nn.Module, node: fx.Node, shared: set[int]) -> Group | str:
    conv = _module(module, node)
    reason = _convolution_reason(conv, shared) or _call_reason(node)
    if reason:
        return reason
    bn_node = next(iter(node.users))
    if bn_node.op != "call_module" or not is_batch_norm(_module(module, bn_node)):
        return "no BatchNorm follows"
    if bn_node.args != (node,) or bn_node.kwargs:
        return "its BatchNorm is called with other than its output alone"
    reason = _bn_reason(_module(module, bn_node), bn_node, shared)
    if reason:
        return reason
    group = Group(node, bn_node)
    _extend(module, group)
    return group


def _convolution_reason(conv: nn.Module, shared: set[int]) -> str | None:
    assert isinstance(conv, nn.Conv2d)
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is a subclass of Conv2d, whose forward may do more"
    if has_hooks(conv):
        return "the convolution has hooks"
    if id(conv) in shared:
        return "the convolution is used at several places"
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode!r}"
    if isinstance(conv.padding, str) and conv.padding != "valid":
        return f"padding is {conv.padding!r}"
    return None


def _call_reason(node: fx.Node) -> str | None:
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return "the convolution is called with other than one positional argument"
    if len(node.users) != 1:
        return f"its output has {len(node.users)} readers"
    return None


def _bn_reason(bn: nn.Module, node: fx.Node, shared: set[int]) -> str | None:
    if has_hooks(bn):
        return "its BatchNorm has hooks"
    calls = sum(n.op == "call_module" and n.target == node.target for n in node.graph.nodes)
    if id(bn) in shared or calls > 1:
        return "its BatchNorm is used at several places"
    if getattr(bn, "running_var", None) is None:
        return "its BatchNorm keeps no running statistics"
    return None


def _extend(module: nn.Module, group: Group) -> None:
    """Take the add and the ReLU behind the BatchNorm into the group where they are its own."""
    last = group.bn
    user = _only_user(last)
    if user is not None and _is_add(user):
        residual = _residual(user, last)
        if residual is not None and not _overwrites(module, user, residual):
            group.add, group.residual, last = user, residual, user
            user = _only_user(last)
    if user is not None and _is_relu(module, user):
        group.relu = user


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_add(node: fx.Node) -> bool:
    named = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return named and len(node.args) == 2 and not node.kwargs


def _residual(add: fx.Node, operand: fx.Node) -> fx.Node | None:
    first, second = add.args
    other = second if first is operand else first
    return other if isinstance(other, fx.Node) and other is not operand else None


def _overwrites(module: nn.Module, add: fx.Node, residual: fx.Node) -> bool:
    """Return whether the add writes into a residual that somebody else may read."""
    if add.target not in (operator.iadd, "add_") or add.args[0] is not residual:
        return False
    return len(residual.users) != 1 or not _is_fresh(module, residual)


def _is_relu(module: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        relu = _module(module, node)
        return type(relu) is nn.ReLU and not has_hooks(relu)
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    return node.op == "call_method" and node.target in ("relu", "relu_")


def _without_hazards(module: nn.Module, group: Group, order: dict[fx.Node, int]) -> Group | str:
    """Return the group, or a shorter one, that no in-place operation in between can change.

    The fused call runs where the group's last node stood. A node in between that overwrites the
    convolution's input or the residual would then be seen by it.
    """
    for candidate in (group, Group(group.conv, group.bn)):
        last = candidate.nodes[-1]
        memory = _memory(module, candidate.inputs)
        between = [
            n for n, i in order.items()
            if order[candidate.conv] < i < order[last] and n not in candidate.nodes
        ]  # fmt: skip
        if not any(_may_overwrite(module, n, memory) for n in between):
            return candidate
    return "an in-place operation stands between the convolution and its BatchNorm"


def _may_overwrite(module: nn.Module, node: fx.Node, memory: set[fx.Node]) -> bool:
    if node.op == "call_module":
        child = _module(module, node)
        if _is_fresh(module, node) or (type(child) is nn.ReLU and not child.inplace):
            return False
    elif not _is_in_place(node):
        return False
    return any(n in memory or not _is_fresh(module, n) for n in node.all_input_nodes)


def _memory(module: nn.Module, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose results may share memory with those of ``nodes``."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [] if _is_fresh(module, node) else node.all_input_nodes
    return found


def _is_in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    in_place_operator = (
        node.op == "call_function"
        and getattr(node.target, "__module__", "") == "_operator"
        and (name == "setitem" or (name.startswith("i") and hasattr(operator, f"__{name}__")))
    )
    flagged = bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    return in_place_operator or flagged or any(a is True for a in node.args[1:])


def _is_fresh(module: nn.Module, node: fx.Node) -> bool:
    """Return whether ``node``'s result is memory of its own, and its input stays as it was."""
    if node.op != "call_module":
        return False
    child = _module(module, node)
    return (type(child) in _PURE_MODULES or is_batch_norm(child)) and not has_hooks(child)


def _share_adds(groups: list[Group]) -> None:
    """Where both operands of one add end a group, leave the add to the left operand's group."""
    owners: dict[fx.Node, Group] = {}
    for group in groups:
        if group.add is None:
            continue
        rival = owners.setdefault(group.add, group)
        if rival is group:
            continue
        keeps, yields = (group, rival) if group.add.args[0] is group.bn else (rival, group)
        owners[group.add] = keeps
        yields.add = yields.residual = yields.relu = None


def _erase_identities(module: nn.Module, graph: fx.Graph) -> list[str]:
    erased = []
    for node in list(graph.nodes):
        if node.op != "call_module":
            continue
        child = _module(module, node)
        if type(child) is nn.Identity and not has_hooks(child) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            erased.append(str(node.target))
    return erased


def _module(module: nn.Module, node: fx.Node) -> nn.Module:
    return module.get_submodule(str(node.target))
