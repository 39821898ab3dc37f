"""Weights in from, and out to, folders of safetensors under Hugging Face's names.

A folder appears whole or not at all: it is written aside, flushed to disk and renamed. Each pipeline rank's
stages are one file, put together by the first rank there, so no rank holds more than its stages; where ranks
keep parts of parameters (ZeRO-3) each embedding, layer and head is one, so that no rank holds more than that.
Casting: tensors are written in the precision they are kept in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from picotron.errors import PlanError
from picotron.planner.layout import Placement, local_shape
from picotron.planner.model import to_hf
from picotron.planner.plan import TrainingPlan
from picotron.planner.recompute import units
from picotron.planner.sharding import PARAMETERS
from picotron.planner.topology import Coordinate, rank_of
from picotron.runtime.layout import WeightSource, place_slice
from picotron.runtime.pipeline import Session
from picotron.runtime.sharded import whole_weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_Names = dict[str, tuple[str, int]]  # of each tensor: its file, and its bytes


def saved_weights(path: str | Path) -> WeightSource:
    """The weights in a safetensors file or in a folder of them (with an index, or one file).

    Tensors are read one at a time, when asked for. Raises PlanError where the path holds no weights, or a
    tensor is missing or of another shape.
    """
    files = _files_by_name(Path(path))

    def read(placement: Placement) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        name = placement.tied_to or placement.name
        if name not in files:
            raise PlanError(
                f"the weights in {path} must hold {name}; it is not among their {len(files)} tensors"
            )
        try:
            with safe_open(files[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise PlanError(f"{name} must be readable in {str(files[name])!r}: {error}") from None
        if tuple(tensor.shape) != placement.shape:
            raise PlanError(
                f"{name} must have shape {placement.shape}, got {tuple(tensor.shape)} in {files[name]}"
            )
        return tensor

    return read


def _files_by_name(path: Path) -> dict[str, Path]:
    """For each tensor, the file that holds it."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.is_dir() and (path / INDEX).exists():
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            return {name: path / file for name, file in index["weight_map"].items()}
        single = path / SINGLE if path.is_dir() else path
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(
            f"weights must be a .safetensors file or a folder with {SINGLE} or {INDEX}, "
            f"got {str(path)!r}: {error}"
        ) from None


def save_weights(session: Session, folder: str | Path) -> Path:
    """Write the model to ``folder`` (a Hugging Face model folder). Collective: every rank calls it.

    Raises PlanError on every rank if any rank cannot write its part; an existing folder stays as it is then,
    and nothing half-written is left.
    """
    final = Path(folder)
    aside = _aside(final)
    first = session.backend.rank == 0
    failure = _attempt(lambda: _fresh_folder(aside)) if first else None
    _agree(session, failure, final)
    names, failure = _write_parts(session, aside)
    _agree(session, failure, final)
    everyone = _gathered_names(session, names)
    failure = _attempt(lambda: _finish(session, aside, final, everyone)) if first else None
    _agree(session, failure, final)
    return final


def _aside(final: Path) -> Path:
    """Where the folder is while it is being written."""
    return final.with_name(f".{final.name}.partial")


Part = tuple[int, tuple[Placement, ...]]  # what one file holds, and the pipeline rank it is from


def _parts(plan: TrainingPlan) -> list[Part]:
    """The files of a plan's model, in order; a tied copy is in none."""
    found = []
    for pp in range(plan.topology.pp):
        stages = plan.rank_stages(pp)
        whole = [tuple(p for stage in stages for p in plan.stage_layout[stage])]
        by_unit = [
            tuple(p for p in plan.stage_layout[stage] if p.segment in unit)
            for stage in stages
            for unit in units(plan.stage_segments[stage])
        ]
        found += [(pp, own) for own in (by_unit if plan.zero_stage >= PARAMETERS else whole)]
    untied = [(pp, tuple(p for p in own if p.tied_to is None)) for pp, own in found]
    return [part for part in untied if part[1]]


def _write_parts(session: Session, aside: Path) -> tuple[_Names, str | None]:
    """Write this rank's files, if it has any: what is in them, and what went wrong first, if anything.

    Every rank comes this far with each part that it keeps some of, whatever went wrong before.
    """
    names: _Names = {}
    failure, where = None, session.where
    parts = _parts(session.plan)
    for number, (pp, placements) in enumerate(parts):
        if pp != where.pp:
            continue
        slices = whole_weights(session.parameters, session.backend, session.communicator.groups, placements)
        if where.dp or where.cp:
            continue
        tensors = _gathered_slices(session, placements, slices)
        if tensors is None:
            continue
        file = _file_name(number, len(parts))
        failure = failure or _attempt(partial(_write_tensors, aside / file, tensors))
        names |= {name: (file, tensor.numel() * tensor.element_size()) for name, tensor in tensors.items()}
    return names, failure


def _gathered_names(session: Session, names: _Names) -> _Names:
    """The names of every stage."""
    everyone: _Names = {}
    for part in session.backend.gather_objects(names):
        assert isinstance(part, dict)
        everyone.update(part)
    return everyone


def _attempt(action: Callable[[], None]) -> str | None:
    """What went wrong with the file system, if anything."""
    from safetensors import SafetensorError

    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None


def _agree(session: Session, failure: str | None, final: Path) -> None:
    """Every rank learns of every rank's failure, so that all stop together, once what was begun is gone."""
    failures = [str(f) for f in session.backend.gather_objects(failure) if f is not None]
    if not failures:
        return
    if session.backend.rank == 0:
        shutil.rmtree(_aside(final), ignore_errors=True)
    session.backend.gather_objects(None)
    raise PlanError(f"the weights' folder must be writable, got {str(final)!r}: {failures[0]}")


def _fresh_folder(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _gathered_slices(
    session: Session, placements: Sequence[Placement], slices: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """Whole tensors on the first tensor-parallel rank; the others hand over their slices."""
    backend, topology, where = session.backend, session.plan.topology, session.where
    found: dict[str, torch.Tensor] = {}
    for placement in placements:
        own = slices[placement.name]
        if where.tp:
            if placement.cut is not None:
                first = rank_of(topology, Coordinate(pp=where.pp))
                backend.send(own.contiguous(), first, "weights").wait()
            continue
        whole = own.new_empty(placement.shape)
        place_slice(whole, own, placement, where)
        for tp in range(1, topology.tp) if placement.cut is not None else ():
            there = Coordinate(pp=where.pp, tp=tp)
            part = own.new_empty(local_shape(placement, there))
            backend.recv(part, rank_of(topology, there), "weights").wait()
            place_slice(whole, part, placement, there)
        found[placement.name] = whole
    return None if where.tp else found


def _file_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    _flush(path)


def _finish(session: Session, aside: Path, final: Path, names: _Names) -> None:
    """Index and configuration, then the rename that makes the folder appear."""
    config = {
        **to_hf(session.plan.model),
        "torch_dtype": str(session.parameters.dtype).removeprefix("torch."),
    }
    _write_json(aside / "config.json", config)
    if len(_parts(session.plan)) > 1:
        total = sum(size for _, size in names.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for name, (file, _) in sorted(names.items())},
        }
        _write_json(aside / INDEX, index)
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        try:
            aside.rename(final)
        except OSError:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        aside.rename(final)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
