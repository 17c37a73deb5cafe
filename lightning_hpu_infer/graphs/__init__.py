"""Graphs of what `predict_step` does: traced by TorchDynamo, captured as HPU graphs, replayed."""

from lightning_hpu_infer.graphs.counts import GraphCounts
from lightning_hpu_infer.graphs.step import StepGraphs, graph_kind

__all__ = ["GraphCounts", "StepGraphs", "graph_kind"]
