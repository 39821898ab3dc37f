"""Rules of ``imputation.json`` for degrees, work and layout: each a function of the row so far.

A rule returns the value of its column, a dict for several cells at once, or None where it does not apply.
"""

from __future__ import annotations

from typing import Any

from picotron.planner.software import software_profile

from . import models
from .machines import known_machine, machine_memory, machine_values
from .text import RowError

Facts = dict[str, Any]

NVIDIA_OF_LATE = ("megatron-2024", "megatron-2025", "megatron-2026")
NVIDIA = ("megatron-2021", *NVIDIA_OF_LATE)
FSDP_TRAINERS = ("llm-foundry", "torchtitan", "automodel")
_SCHEDULES = (  # a word of a schedule's printed name, and the planner's name
    ("interleaved-zb", "interleaved-zb"),
    ("dualpipe", "dualpipe-v"),
    ("zbv", "zb-v"),
    ("zb-v", "zb-v"),
    ("zb-h2", "zb-h2"),
    ("zb", "zb-h1"),
    ("zero-bubble", "zb-h1"),
    ("v-half", "v-half"),
    ("v-min", "v-min"),
    ("gpipe", "afab"),
    ("afab", "afab"),
    ("bfs", "bfs"),
    ("looped", "bfs"),
)


def gpus(facts: Facts) -> int | None:
    known = [facts.get(name) for name in ("dp", "tp", "pp")]
    if not all(known):
        raise RowError("n_gpus is not stated, nor are the degrees that would give it")
    return int(facts["dp"] * facts["tp"] * facts["pp"] * (facts.get("cp") or 1))


def model_parallel(facts: Facts) -> int | None:
    ranks = (facts.get("dp") or 0) * (facts.get("cp") or 1)
    known = bool(facts.get("tp")) and bool(facts.get("pp"))
    return None if known or not ranks or facts["n_gpus"] % ranks else int(facts["n_gpus"] // ranks)


def tp_of_model_parallel(facts: Facts) -> int | None:
    total, pp = facts.get("model_parallel"), facts.get("pp")
    if total is None:
        return None
    if pp:
        return None if total % pp else int(total // pp)
    return max(degree for degree in (1, 2, 4, 8) if total % degree == 0)


def pp_of_model_parallel(facts: Facts) -> int | None:
    total = facts.get("model_parallel")
    return None if total is None or total % facts["tp"] else int(total // facts["tp"])


def cp_of_gpus(facts: Facts) -> int | None:
    rest = (facts.get("dp") or 0) * facts["tp"] * facts["pp"]
    return int(facts["n_gpus"] // rest) if rest and facts["n_gpus"] % rest == 0 else None


def dp(facts: Facts) -> int:
    inner = facts["tp"] * facts["pp"] * facts["cp"]
    if facts["n_gpus"] % inner:
        raise RowError(f"n_gpus must be a multiple of tp pp cp = {inner}, got {facts['n_gpus']}")
    return int(facts["n_gpus"] // inner)


def ep_of_fsdp(facts: Facts) -> int | None:
    words = facts["zero_stage_or_fsdp"].lower()
    sharded = "fsdp" in words or "zero3" in words
    return 1 if sharded and facts.get("num_experts") else None


def ep_that_fits(facts: Facts) -> int | None:
    """Doubled from 8 until 4 bytes a weight, and 12 over the ranks that share it, fit in half the memory."""
    experts, machine = facts.get("num_experts"), known_machine(facts["gpu"])
    if not experts or machine is None:
        return None
    memory = machine_memory(machine)
    sparse_layers = facts["layers"] - (facts.get("dense_layers") or 0)
    weights = 3.0 * experts * facts["hidden"] * facts["expert_intermediate"] * sparse_layers / facts["pp"]
    ranks = facts["dp"] * facts["cp"] * facts["tp"]
    possible = [ep for ep in range(1, ranks + 1) if ranks % ep == 0 and experts % ep == 0]
    within = max(ep for ep in possible if ep <= 8)
    wide = [ep for ep in possible if ep >= within]
    fitting = (ep for ep in wide if weights / ep * (4 + 12 * ep / ranks) <= memory / 2)
    return next(fitting, wide[-1])


def etp(facts: Facts) -> int | None:
    return 1 if facts["ep"] > 1 or (facts["year"] or 2030) >= 2025 else None


def etp_is_tp(facts: Facts) -> Any:
    return facts["tp"]


def seq_len(facts: Facts) -> int:
    name = models.hyphened(facts["model_name"])
    if name.startswith(("internlm", "gpt")) and "oss" not in name:
        return 2048
    if "llama3" in name or "llama-3" in name:
        return 8192
    return 2048 if (facts["year"] or 2030) <= 2022 else 4096


def precision(facts: Facts) -> str:
    old = (facts["year"] or 2030) <= 2022 or "megatron-deepspeed" in facts["notes"].lower()
    return "fp16" if old or "v100" in facts["gpu"].lower() else "bf16"


def precision_by_speed(facts: Facts) -> str | None:
    machine, rate = known_machine(facts["gpu"]), facts.get("tflops_per_gpu")
    if machine is None or not rate or facts["seq_len"] > 16384 or machine["architecture"] == "volta":
        return None
    peaks = machine_values(machine, "fp16")
    narrow = machine["architecture"] in ("hopper", "blackwell")
    return "fp8" if narrow and rate * 1e12 > 0.75 * peaks["peak_flops"] else None


def micro_batch_of_accumulation(facts: Facts) -> int | None:
    batch, steps = facts.get("global_batch"), facts.get("accumulation")
    if not batch or not steps or batch % (facts["dp"] * steps):
        return None
    return int(batch // (facts["dp"] * steps))


def micro_batch_of_rank(facts: Facts) -> int | None:
    return int(facts["batch_per_dp"]) if facts.get("batch_per_dp") and facts["pp"] == 1 else None


def global_batch_of_rank(facts: Facts) -> int | None:
    return int(facts["batch_per_dp"] * facts["dp"]) if facts.get("batch_per_dp") else None


def global_batch(facts: Facts) -> int:
    steps = facts.get("accumulation")
    facts["batch_is_guessed"] = steps is None
    guessed = 8 * facts["pp"] if facts["pp"] > 1 else 8 if _by_nvidia(facts) else 1
    return int(facts["dp"] * facts["micro_batch"] * (steps or guessed))


def _by_nvidia(facts: Facts) -> bool:
    about = " ".join((facts["family"], facts["source"], facts["notes"])).lower()
    return any(word in about for word in ("nvidia", "nemo", "megatron"))


def vpp_without_pipeline(facts: Facts) -> int | None:
    return 1 if facts["pp"] == 1 else None


def vpp_by_schedule(facts: Facts) -> int | None:
    text = facts["schedule"].lower()
    return 1 if text and "interleav" not in text else None


def vpp_elsewhere(facts: Facts) -> int | None:
    return None if facts["profile"] in NVIDIA or "interleav" in facts["schedule"].lower() else 1


def vpp_interleaved(facts: Facts) -> int | None:
    pp, layers = facts["pp"], facts["layers"]
    microbatches = facts["global_batch"] / (facts["dp"] * facts["micro_batch"])
    if microbatches % pp:
        return 1
    return next((total // pp for total in (layers, layers + 2) if total % pp == 0), None)


def schedule(facts: Facts) -> str:
    text = facts["schedule"].lower().replace("_", "-")
    for word, name in _SCHEDULES:
        if word in text:
            return name
    return "interleaved" if facts["vpp"] > 1 else "1f1b"


def zero_of_megatron(facts: Facts) -> int | None:
    if facts["zero_stage_or_fsdp"] or facts["distributed_optimizer"].lower() in ("no", "false", "0"):
        return None
    modern = facts["profile"] in NVIDIA_OF_LATE
    return 1 if modern or facts["distributed_optimizer"] else None


def zero_of_fsdp(facts: Facts) -> int | None:
    return 3 if not facts["zero_stage_or_fsdp"] and facts["profile"] in FSDP_TRAINERS else None


def sequence_parallel(facts: Facts) -> int | None:
    if facts["sequence_parallel"] or facts["tp"] == 1:
        return None
    return 1 if facts["profile"] in (*NVIDIA_OF_LATE, "internevo") else None


def recompute_of_2021(facts: Facts) -> str | None:
    large = (facts.get("params_b") or 12 * facts["layers"] * facts["hidden"] ** 2 / 1e9) >= 1
    return "full" if (facts["year"] or 2030) <= 2022 and large else None


def gradient_bytes(facts: Facts) -> float:
    return software_profile(facts["profile"]).gradient_bytes


def gradient_bytes_kept(facts: Facts) -> Any:
    return facts["gradient_bytes"]


def wire_bytes(facts: Facts) -> float:
    return min(software_profile(facts["profile"]).wire_bytes, facts["gradient_bytes"])


def convention(facts: Facts) -> str:
    return str(facts["flops_convention"])


def ends(facts: Facts) -> int | None:
    stages = facts["pp"] * facts["vpp"]
    return 1 if facts["pp"] > 1 and facts["layers"] % stages and (facts["layers"] + 2) % stages == 0 else None


def nvlink_domain(facts: Facts) -> int | None:
    machine = known_machine(facts["gpu"])
    if machine is None or machine["preset"] != "gb200" or facts["n_gpus"] <= 72:
        return None
    return next((size for size in (64, 32) if facts["n_gpus"] % size == 0), None)
