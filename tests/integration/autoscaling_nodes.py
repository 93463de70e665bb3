"""The nodes that the fake autoscaler starts: processes of this machine, which Ray loads this class for by its name."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Nodes(FakeMultiNodeProvider):
    """Ray's own, for kinds of nodes that say how much memory they have, as those of clouds do.

    Ray Data asks for nodes as large as those that it sees. Ray's class cannot start a node that says so, so it finds
    out by itself.
    """

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, float], labels: Any
    ) -> None:
        known = {name: amount for name, amount in resources.items() if name != "memory"}
        super()._create_node_with_resources_and_labels(node_config, tags, count, known, labels)
