"""Megatron-LM's arguments as a plan, so that what already runs can be priced: the inverse of ``to_megatron``.

Defaults are Megatron-LM's own (see ``megatron`` for the release), and so are the rules by which one flag
refuses another; of the flags of earlier releases those that shape a run are read too. Every flag that changes
a plan is used; what it says that no plan has is noted, and the rest is listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.megatron import MegatronArguments
from picotron.planner.megatron_flags import Given, given, left_over
from picotron.planner.megatron_read_layout import (
    check_contexts,
    read_bucket_bytes,
    read_offload,
    read_recompute,
    read_sharding,
    read_stages,
    read_topology,
)
from picotron.planner.megatron_read_model import read_model
from picotron.planner.megatron_read_training import note_what_is_not_counted, read_software, read_workload
from picotron.planner.megatron_text import WrittenArguments, flags, read_arguments
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.validators import shown

LAUNCHER = {
    "nproc_per_node": "devices",
    "nproc-per-node": "devices",
    "nnodes": "nodes",
    "nnode": "nodes",
}
BESIDE_LAUNCHER = ("node-rank", "master-addr", "master-port", "rdzv-id", "rdzv-backend", "rdzv-endpoint")


@frozen(kw_only=True)
class ImportedPlan:
    """The plan that a list of arguments runs, and what became of each flag.

    ``software`` holds the fields of a software profile that the flags decide; ``ignored`` do not matter to a
    plan, ``unknown`` says which flags Megatron-LM does not have, ``notes`` what is read otherwise.
    """

    plan: TrainingPlan
    software: tuple[tuple[str, Any], ...]
    ignored: tuple[str, ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]


def from_megatron(
    source: str | Sequence[str] | MegatronArguments,
    cluster: ClusterSpec | str,
    *,
    vocab_size: int | None = None,
    name: str = "megatron",
    variables: Mapping[str, str] | None = None,
) -> ImportedPlan:
    """The plan of Megatron-LM's arguments on a cluster.

    ``source`` is a shell script or a piece of one, a file's text, YAML, or the words themselves. A cluster
    named without its shape takes that of the launcher's line. ``vocab_size`` stands in where it is in a
    tokenizer's file, ``variables`` for what a script takes from its caller. Raises PlanError for arguments
    that contradict each other, cannot be read, or that no plan can say.
    """
    written = _written(source, variables)
    read = given(flags((*written.words,)))
    for note in written.notes:
        read.note(note)
    machine = _cluster(cluster, _launched(read, written), read)
    topology = read_topology(read, machine)
    seq_len = read.integer("seq-length", "encoder-seq-length")
    model = read_model(read, tp=topology.tp, seq_len=seq_len, vocab_size=vocab_size, name=name)
    micro_batch = read.integer("micro-batch-size")
    work = read_workload(read, topology, seq_len, micro_batch)
    virtual, stage_layers = read_stages(read, model, topology)
    sequence_parallel = read.has("sequence-parallel") and topology.tp > 1
    if read.has("tp-comm-overlap") and not sequence_parallel:
        raise PlanError(
            "--tp-comm-overlap must come with --sequence-parallel and a tensor-parallel size above 1"
        )
    check_contexts(read, topology, seq_len)
    if topology.ep > 1 and model.experts is None:
        raise PlanError("--expert-model-parallel-size must come with --num-experts")
    options: dict[str, Any] = {
        **read_sharding(read, topology),
        "recompute": read_recompute(read, stage_layers),
        "offload": read_offload(read, model, topology),
    }
    made = plan(
        model,
        machine,
        work,
        **{axis: getattr(topology, axis) for axis in ("dp", "pp", "cp", "tp", "ep", "etp", "order")},
        schedule="interleaved" if virtual > 1 else "1f1b",
        virtual_stages=virtual,
        micro_batch=micro_batch,
        sequence_parallel=sequence_parallel,
        stage_layers=stage_layers,
        bucket_bytes=read_bucket_bytes(read, topology, work),
        **options,
    )
    software = read_software(read)
    note_what_is_not_counted(read, topology)
    ignored, unknown = left_over(read)
    return ImportedPlan(
        plan=evolve(made, chosen=()),
        software=software,
        ignored=ignored,
        unknown=unknown,
        notes=tuple(read.notes),
    )


def _written(
    source: str | Sequence[str] | MegatronArguments, variables: Mapping[str, str] | None
) -> WrittenArguments:
    if isinstance(source, MegatronArguments):
        return WrittenArguments(words=source.words)
    if isinstance(source, str):
        return read_arguments(source, variables)
    words = tuple(source)
    if not all(isinstance(word, str) for word in words):
        raise PlanError(f"arguments must be a text or a sequence of words, got {shown(source)}")
    if not any(word.startswith("--") for word in words):
        raise PlanError(f"arguments must have a --flag among them, got {shown(words)}")
    return WrittenArguments(words=words)


def _launched(read: Given, written: WrittenArguments) -> dict[str, int]:
    """Nodes and devices of each, where the launcher's words say so."""
    launcher = given(flags(written.launcher)).values
    found: dict[str, int] = {}
    for flag, what in LAUNCHER.items():
        values = launcher.get(flag.replace("_", "-"), ()) or read.values.get(flag, ())
        read.used.add(flag)
        if values and values[0].isdecimal() and int(values[0]):
            found[what] = int(values[0])
    read.used |= set(BESIDE_LAUNCHER)
    return found


def _cluster(cluster: ClusterSpec | str, launched: Mapping[str, int], read: Given) -> ClusterSpec:
    """The cluster as asked for; its shape from the launcher where the caller gave none."""
    if isinstance(cluster, str) and ":" not in cluster and not cluster.endswith(".json") and launched:
        return ClusterSpec.preset(
            cluster, nodes=launched.get("nodes", 1), devices_per_node=launched.get("devices")
        )
    made = ClusterSpec.parse(cluster) if isinstance(cluster, str) else cluster
    if not isinstance(made, ClusterSpec):
        raise PlanError(f"cluster must be a ClusterSpec or its name, got {type(made).__name__}")
    asked = launched.get("nodes", made.nodes), launched.get("devices", made.devices_per_node)
    if asked != (made.nodes, made.devices_per_node):
        read.note(
            f"the launcher has {asked[0]} x {asked[1]} devices: the cluster's own "
            f"{made.nodes} x {made.devices_per_node} are taken"
        )
    return made
