"""Megatron-LM's arguments as a plan, so that what already runs can be priced: the inverse of ``to_megatron``.

Defaults are Megatron-LM's own (see ``megatron`` for the release), and so are the rules by which one flag
refuses another; of the flags of earlier releases those that shape a run are read too. Every flag that changes
a plan is used; what it says that no plan has is noted, and the rest is listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.megatron import PRICED_WITH, MegatronArguments
from picotron.planner.megatron_flags import Given, given, left_over
from picotron.planner.megatron_read_layout import (
    check_contexts,
    read_bucket_bytes,
    read_offload,
    read_recompute,
    read_sequence_parallel,
    read_sharding,
    read_stages,
    read_topology,
)
from picotron.planner.megatron_read_model import read_model
from picotron.planner.megatron_read_training import note_what_is_not_counted, read_workload
from picotron.planner.megatron_software import PROFILE, flagged, read_software
from picotron.planner.megatron_text import WrittenArguments, flags, read_arguments
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.software import SoftwareProfile, software_profile
from picotron.planner.validators import is_size, shown

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

    ``software`` holds the fields of a software profile that the flags decide; they are in the profile of the
    plan's cluster unless the caller's cluster brought its own. ``ignored`` do not matter to a plan,
    ``unknown`` says which flags Megatron-LM does not have, ``notes`` what is read otherwise.
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
    profile: SoftwareProfile | str | None = None,
) -> ImportedPlan:
    """The plan of Megatron-LM's arguments on a cluster.

    ``source`` is a shell script or a piece of one, a file's text, YAML, or the words themselves. A cluster
    named without its shape takes that of the launcher's line. ``vocab_size`` stands in where it is in a
    tokenizer's file, ``variables`` for what a script takes from its caller. ``profile`` is the software on
    which the flags switch overlaps on and off: left out, ``megatron-2025`` for a cluster named by its preset
    (or what a script of ``to_megatron`` names), while a ``ClusterSpec`` and a file keep the profile that they
    have. Raises PlanError for arguments that contradict each other, cannot be read, or that no plan can say.
    """
    if vocab_size is not None and not is_size(vocab_size):
        raise PlanError(f"vocab_size must be a whole number of at least 1, got {shown(vocab_size)}")
    if variables is not None and not isinstance(variables, Mapping):
        raise PlanError(f"variables must be a mapping of names to texts, got {shown(variables)}")
    written = _written(source, variables)
    read = given(flags((*written.words,)))
    for note in written.notes:
        read.note(note)
    machine = _cluster(cluster, _launched(read, written), read)
    made = _planned(read, machine, vocab_size, name)
    own, software = _software(read, made, _asked(profile), cluster, _kept(source))
    made = evolve(made, cluster=evolve(machine, profile=own))
    note_what_is_not_counted(read, made.topology)
    ignored, unknown = left_over(read)
    return ImportedPlan(
        plan=evolve(made, chosen=()),
        software=tuple(sorted(software.items())),
        ignored=ignored,
        unknown=unknown,
        notes=tuple(read.notes),
    )


def _planned(read: Given, machine: ClusterSpec, vocab_size: int | None, name: str) -> TrainingPlan:
    """The plan that the flags describe; what they say of software is not read yet."""
    topology = read_topology(read, machine)
    seq_len = read.integer("seq-length", "encoder-seq-length")
    model = read_model(read, tp=topology.tp, seq_len=seq_len, vocab_size=vocab_size, name=name)
    micro_batch = read.integer("micro-batch-size")
    work = read_workload(read, topology, seq_len, micro_batch)
    virtual, stage_layers = read_stages(read, model, topology)
    sequence_parallel = read_sequence_parallel(read, topology)
    check_contexts(read, topology, seq_len)
    if topology.ep > 1 and model.experts is None:
        raise PlanError("--expert-model-parallel-size must come with --num-experts")
    options: dict[str, Any] = {
        **read_sharding(read, topology),
        "recompute": read_recompute(read, stage_layers),
        "offload": read_offload(read, model, topology),
    }
    return plan(
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


def _asked(profile: SoftwareProfile | str | None) -> SoftwareProfile | None:
    made = software_profile(profile) if isinstance(profile, str) else profile
    if made is not None and not isinstance(made, SoftwareProfile):
        raise PlanError(f"profile must be a SoftwareProfile or its name, got {shown(profile)}")
    return made


def _kept(source: object) -> SoftwareProfile | None:
    """The profile that a script of ``to_megatron`` names."""
    if isinstance(source, MegatronArguments):
        return software_profile(source.priced_with) if source.priced_with else None
    found = re.search(rf"^{PRICED_WITH}(.*)\.$", source, re.MULTILINE) if isinstance(source, str) else None
    return software_profile(found[1]) if found else None


def _software(
    read: Given,
    made: TrainingPlan,
    asked: SoftwareProfile | None,
    cluster: ClusterSpec | str,
    kept: SoftwareProfile | None,
) -> tuple[SoftwareProfile, dict[str, Any]]:
    """The profile with which the plan is priced, and the fields that flags decide.

    Flags change the one that is asked for or, on an accelerator's preset, ``megatron-2025``; what a script
    of ours names, and what a cluster of the caller's own has, stays.
    """
    named = isinstance(cluster, str) and not cluster.endswith(".json") and made.cluster.device.kind != "cpu"
    own = made.cluster.profile if not named else kept
    base = asked or own or software_profile(PROFILE)
    software = read_software(read, made, base)
    return (own if own and not asked else flagged(base, software)), software


def _written(
    source: str | Sequence[str] | MegatronArguments, variables: Mapping[str, str] | None
) -> WrittenArguments:
    if isinstance(source, MegatronArguments):
        return WrittenArguments(words=source.words)
    if isinstance(source, str):
        return read_arguments(source, variables)
    words = tuple(source) if isinstance(source, list | tuple) else (source,)
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
