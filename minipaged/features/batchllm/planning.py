"""Plans a BatchLLM batch: groups prompts so that they share as much as possible (Zheng et al., arXiv 2412.03594).

Prompts with common prefixes form a tree. The paper's engine shares *one* prefix per request, so a dynamic program
chooses which one: the prompts that share it are a *group*. `groups.Groups` runs a group together and keeps its prefix
until the group ends. All depths are whole blocks, because block tables share whole blocks; so the prediction is exact.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(eq=False)
class Node:
    """A prefix of ``depth`` blocks that several prompts share; its ``requests`` share no deeper one."""

    depth: int
    requests: list[int] = field(default_factory=list)  # indices of prompts
    children: list[Node] = field(default_factory=list)


class Group(NamedTuple):
    """Prompts, by index, whose first ``num_blocks`` blocks are computed once; 0 for a prompt that shares nothing."""

    members: list[int]
    num_blocks: int


class Plan(NamedTuple):
    """Groups in the order in which to run them, and the number of prompt tokens that need not be computed."""

    groups: list[Group]
    saved_tokens: int


def plan(prompts: Seq[Seq[int]], outputs: Seq[int], block_size: int) -> Plan:
    """Groups the prompts (token ids), and sorts the groups by output tokens per computed token, highest first.

    ``outputs``: how many tokens each may generate. Steps of decodes alone leave the hardware idle; early decodes share
    their steps with the prefills of later groups.
    """
    tree = prefix_tree(prompts, block_size)
    groups = groups_of(tree, best(tree)[1])

    def ratio(one: Group) -> float:
        computed = sum(len(prompts[i]) for i in one.members) - saved_blocks(one) * block_size
        return sum(outputs[i] for i in one.members) / computed

    groups.sort(key=ratio, reverse=True)
    return Plan(groups, sum(map(saved_blocks, groups)) * block_size)


def saved_blocks(one: Group) -> int:
    return (len(one.members) - 1) * one.num_blocks


def prefix_tree(prompts: Seq[Seq[int]], block_size: int) -> Node:
    """The tree of all prefixes, in whole blocks, that at least two prompts share; its root is the empty prefix.

    The last token of each prompt is left out: it must be computed to get logits. After sorting, prompts with a common
    prefix are neighbours, so comparing neighbours builds the tree. No recursion: trees may be deep.
    """
    blocks = [[tuple(p[i : i + block_size]) for i in range(0, len(p) - block_size, block_size)] for p in prompts]
    order = sorted(range(len(prompts)), key=blocks.__getitem__)
    neighbours = zip(order, order[1:], strict=False)
    shared = [_common(blocks[one], blocks[other]) for one, other in neighbours]
    root = Node(0)
    path = [root]  # from the root to the last prompt's node
    for index, before, after in zip(order, [0, *shared], [*shared, 0], strict=False):
        while path[-1].depth > before:
            closed = path.pop()
            if path[-1].depth < before:  # the two prompts diverge between these nodes
                path[-1].children[-1] = between = Node(before, children=[closed])
                path.append(between)
        if after > path[-1].depth:
            path[-1].children.append(Node(after))
            path.append(path[-1].children[-1])
        path[-1].requests.append(index)
    return root


def _common(one: Seq[tuple[int, ...]], other: Seq[tuple[int, ...]]) -> int:
    """Number of blocks in the common prefix of both."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def best(root: Node) -> tuple[int, dict[Node, bytes]]:
    """The most blocks that one level of groups can save, and for each node below the root when to *open* it.

    F(v, u) is what the subtree of v saves if u is the nearest open node above. If v is closed, its requests share only
    u; if v is open, they share all of v, which is computed once:

        F(v, u) = max(Σ F(c, u) + |requests(v)| · depth(u),  Σ F(c, v) + (|requests(v)| − 1) · depth(v))

    Byte i of a node says whether it opens when the nearest open node is its ancestor at level i; the root is level 0.
    """
    F: dict[Node, list[int]] = {}  # by level of u; a child's list is dropped when its parent's is known
    opens: dict[Node, bytes] = {}
    above: list[int] = []  # depths of the nodes from the root to the current one's parent
    todo = [(root, False)]
    while todo:
        node, after_children = todo.pop()
        if not after_children:
            todo += [(node, True), *((child, False) for child in node.children)]
            above.append(node.depth)
            continue
        above.pop()
        below = [F.pop(child) for child in node.children] or [[0] * (len(above) + 1)]
        *for_u, for_v = map(sum, zip(*below, strict=True))
        if_open = for_v + (len(node.requests) - 1) * node.depth
        if_closed = [saved + len(node.requests) * depth for saved, depth in zip(for_u, above, strict=True)]
        F[node] = [max(saved, if_open) for saved in if_closed]
        opens[node] = bytes(if_open > saved for saved in if_closed)
    return if_open, opens  # of the root, whose depth is 0


def groups_of(root: Node, opens: dict[Node, bytes]) -> list[Group]:
    """The groups of a tree, given which nodes `best` opens; a prompt without a group gets one of its own."""
    groups: list[Group] = []
    todo: list[tuple[Node, int, int, Group | None]] = [(root, 0, 0, None)]  # node, level; open: level, group
    while todo:
        node, level, open_level, around = todo.pop()
        if level and opens[node][open_level]:
            open_level, around = level, Group([], node.depth)
            groups.append(around)
        if around:
            around.members.extend(node.requests)
        else:
            groups += [Group([index], 0) for index in node.requests]
        todo += [(child, level + 1, open_level, around) for child in reversed(node.children)]
    return groups
