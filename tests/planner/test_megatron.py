"""Megatron-LM's arguments: what a plan becomes, and what scripts of the kind people run become."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files

import pytest
from attrs import evolve

from picotron.errors import PlanError
from picotron.planner.cluster import ClusterSpec
from picotron.planner.megatron import MegatronArguments, to_megatron
from picotron.planner.megatron_import import ImportedPlan, from_megatron
from picotron.planner.megatron_text import expression, flags, read_arguments
from picotron.planner.model import ModelSpec
from picotron.planner.plan import TrainingPlan, plan
from picotron.planner.serialize import diff
from picotron.planner.software import software_profile
from picotron.planner.torchtitan import to_torchtitan
from picotron.planner.workload import Workload


def made(name: str = "llama-3.1-70b", cluster: str = "h100:16x8", **options: object) -> TrainingPlan:
    """A plan of a well-known model."""
    work = options.pop("work", Workload(global_batch=512, seq_len=8192))
    return plan(ModelSpec.from_hf(name), ClusterSpec.parse(cluster), work, **options)


def values(arguments: MegatronArguments) -> dict[str, str]:
    """Flag to its values, as text."""
    return {argument[0]: " ".join(argument[1:]) for argument in arguments.arguments}


def test_a_dense_plan_is_told_whole():
    """Topology, batch, model, precision, sharding and recomputation each have their flags."""
    exported = to_megatron(
        made(tp=8, pp=2, cp=2, micro_batch=2, virtual_stages=2, schedule="interleaved", zero_stage=1, shard=4)
    )
    told = values(exported)
    expected = {
        "--tensor-model-parallel-size": "8",
        "--sequence-parallel": "",
        "--pipeline-model-parallel-size": "2",
        "--context-parallel-size": "2",
        "--micro-batch-size": "2",
        "--global-batch-size": "512",
        "--num-query-groups": "8",
        "--ffn-hidden-size": "28672",
        "--rotary-base": "500000",
        "--use-rope-scaling": "",
        "--pipeline-model-parallel-layout": "Et*20|t*20|t*21|t*19L",
        "--num-distributed-optimizer-instances": "2",
        "--overlap-param-gather": "",
        "--untie-embeddings-and-output-weights": "",
    }
    assert expected.items() <= told.items()
    assert "--num-virtual-stages-per-pipeline-rank" not in told  # the layout says it
    assert exported.unexpressed == ()
    assert "torchrun --nproc-per-node 8 --nnodes 16" in str(exported)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pp": 2, "schedule": "zb-h1"}, "schedule 'zb-h1': Megatron-LM has 1F1B and its interleaving"),
        ({"tp": 4, "cp": 2, "order": ("pp", "cp", "dp", "tp")}, "ranks in the order pp,cp,dp,tp"),
        ({"recompute": ("none",) * 79 + ("full",)}, "recomputation layer by layer"),
        ({"recompute": ("none",) * 40 + ("selective",) * 40}, "selective recomputation in 40 of 80 layers"),
        ({"offload": True}, "activations of 80 of 80 layers offloaded"),
        ({"bucket_bytes": 3}, "buckets of 3 bytes"),
        ({"pp": 4, "virtual_stages": 2, "schedule": "interleaved", "micro_batch": 8}, "multiples of pp=4"),
    ],
)
def test_what_cannot_be_said_is_said(options: dict[str, object], sentence: str):
    """A sentence each, and as a comment of the script."""
    exported = to_megatron(made(**options))
    (said,) = exported.unexpressed
    assert sentence in said
    assert f"# NOT EXPRESSED: {said}" in str(exported)


def test_only_flags_of_the_current_release_are_written():
    """Dense, sparse and latent, sharded and recomputed: no flag that the release does not have."""
    table = json.loads((files("picotron.planner") / "presets" / "megatron_flags.json").read_text())
    known = {f"--{name}" for name in table["flags"]}
    sparse = {
        "cluster": "h100:8x8",
        "ep": 8,
        "work": Workload(global_batch=64, seq_len=4096, precision="fp8"),
    }
    for one in (
        made(zero_stage=3, recompute=("full",) * 20 + ("none",) * 60),
        made(offload=(True,) * 20 + (False,) * 60, order=("dp", "pp", "cp", "tp"), pp=2),
        made("deepseek-v3", **sparse, pp=8, recompute="selective"),
        made("mixtral-8x7b", **sparse),
        made("gpt3-175b", work=Workload(global_batch=512, seq_len=2048, warmup_steps=5, decay_steps=9)),
    ):
        written = {argument[0] for argument in to_megatron(one).arguments}
        assert written <= known, written - known


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b", "gpt3-175b", "llama-3.1-8b"]
)
def test_well_known_models_come_back_whole(name: str):
    """Through the text of the script, and through the arguments."""
    work = Workload(global_batch=64, seq_len=2048, decay_steps=1000, warmup_steps=10, seed=3)
    one = made(name, "h100:8x8", work=work, pp=2, zero_stage=1)
    exported = to_megatron(one)
    assert exported.unexpressed == ()
    for source, where in ((exported, "h100:8x8"), (str(exported), "h100:8x8"), (exported.words, one.cluster)):
        found = from_megatron(source, where, name=name)
        assert diff(found.plan, evolve(one, chosen=())) == ()
        assert found.unknown == ()


GPT3 = """
GPUS_PER_NODE=8
NODES=${SLURM_NNODES:-"16"}
WORLD_SIZE=$(($GPUS_PER_NODE*$NODES))
LAUNCH=( --nproc_per_node $GPUS_PER_NODE --nnodes $NODES --master_addr localhost )
MODEL=(
    --num-layers 96
    --hidden-size 12288   # as published
    --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048
)
TRAIN=(--micro-batch-size 1 --global-batch-size 1536 --fp16 --lr 6.0e-5 --min-lr 6.0e-6
       --lr-decay-style cosine --lr-decay-iters 430000 --lr-warmup-fraction .001)
if [ -n "${DEBUG}" ]; then
    TRAIN+=(--num-layers 2)
else
    TRAIN+=("--clip-grad 1.0")
fi
torchrun ${LAUNCH[@]} pretrain_gpt.py ${MODEL[@]} \\
    ${TRAIN[@]} \\
    --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 \\
    --vocab-file $1/vocab.json --merge-file $1/merges.txt --save "$2"
"""


def test_a_script_with_arrays_and_variables_is_read():
    """GPT-3 175B as the 2021 scripts have it, on the shape of the launching line."""
    found = from_megatron(GPT3, "a100-80gb")
    topology, work = found.plan.topology, found.plan.workload
    assert (topology.tp, topology.pp, topology.dp) == (8, 16, 1)
    assert found.plan.cluster.num_devices == 128
    assert found.plan.model.family == "gpt2"
    assert found.plan.model.vocab_size == 51_200  # 50,257 to the next multiple of 128 * 8
    assert 174e9 < found.plan.model.num_parameters < 176e9
    assert (work.precision, work.warmup_steps, work.decay_steps) == ("fp16", 430, 430_000)
    assert work.min_learning_rate_ratio == 0.1
    assert found.plan.zero_stage == 0
    assert {"--vocab-file", "--save"} <= set(found.ignored)
    assert any("dropout" in note for note in found.notes)


MIXTRAL = """
--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --swiglu
--group-query-attention --num-query-groups 8 --normalization RMSNorm --position-embedding-type rope
--rotary-base 1000000 --disable-bias-linear --untie-embeddings-and-output-weights --no-position-embedding
--seq-length 4096 --max-position-embeddings 32768 --num-experts 8 --moe-router-topk 2
--moe-token-dispatcher-type alltoall --tokenizer-type Llama2Tokenizer --micro-batch-size 1
--global-batch-size 256 --bf16 --lr 1e-4 --use-distributed-optimizer --sequence-parallel
--tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8
--num-layers-per-virtual-pipeline-stage 4 --overlap-grad-reduce --attention-dropout 0 --hidden-dropout 0
"""


def imported(more: str = "", cluster: str = "h100:8x8") -> ImportedPlan:
    """Mixtral's arguments and more of them."""
    return from_megatron(f"{MIXTRAL} {more}", cluster)


def test_a_list_of_arguments_is_read():
    """Mixtral 8x7B: experts, stages of each rank, ZeRO 1; sequence parallelism needs more than one rank."""
    found = imported().plan
    assert found.model.family == "mixtral"
    assert 46e9 < found.model.num_parameters < 48e9
    assert (found.topology.ep, found.topology.etp, found.topology.dp) == (8, 1, 16)
    assert (found.schedule_name, found.virtual_stages, found.stage_layers) == ("interleaved", 2, (4,) * 8)
    assert (found.zero_stage, found.sequence_parallel) == (1, False)
    assert ("reduce_overlap", True) in imported().software


def test_flags_switch_the_profile_s_overlaps_on_and_off():
    """Shares are the profile's: what no flag asks for is off, and a layout without room for it keeps it."""
    base = software_profile("megatron-2025")
    found = imported().plan.cluster.profile
    assert found.reduce_overlap and not found.gather_overlap
    assert (found.expert_overlap, found.tensor_overlap) == (0.0, base.tensor_overlap)
    assert found.name == "megatron-2025, as flagged"
    asked = "--overlap-param-gather --overlap-moe-expert-parallel-comm --use-distributed-optimizer"
    assert imported(asked).plan.cluster.profile == base
    assert imported("--attention-backend unfused").plan.cluster.profile.attention == {
        "default": "fused-softmax"
    }
    own = ClusterSpec.preset("h100", nodes=8)
    assert from_megatron(MIXTRAL, own).plan.cluster == own
    old = from_megatron(MIXTRAL, own, profile="megatron-2021").plan.cluster.profile
    assert (old.kernels, old.reduce_overlap) == ("fused", True)
    with pytest.raises(PlanError, match="a software profile must be one of"):
        from_megatron(MIXTRAL, "h100:8x8", profile="megatron-1999")


def test_flags_that_its_own_checks_refuse_together_are_not_written():
    """Fused rotary kernels of latent attention take YaRN alone; layers' graphs go with no recomputation."""
    work = Workload(global_batch=64, seq_len=2048)
    latent = to_megatron(made("deepseek-v3", "h100:8x8", work=work, pp=8))
    assert "--no-rope-fusion" in latent.words
    graphs = [
        "--cuda-graph-impl" in to_megatron(made(recompute=mode), profile="megatron-2026").words
        for mode in ("none", "selective", "full")
    ]
    assert graphs == [True, True, False]
    assert "NVTE_CPU_OFFLOAD_V1=1" in to_megatron(made(offload=True)).environment


@pytest.mark.parametrize("modules", [' "[core_attn, mlp]"', "\n    - core_attn\n    - mlp"])
def test_yaml_is_read_as_arguments(modules: str):
    """``--key: value`` lines under MODEL_ARGS, a list on one line or on several; true is a flag alone."""
    pairs = [(f"  --{name}", " ".join(own) or "true") for name, own in flags(MIXTRAL.split())]
    text = "BEFORE: |\n  pip list || true\nMODEL_ARGS:\n" + "\n".join(f"{k}: {v}" for k, v in pairs)
    text += f"\n  --recompute-granularity: selective\n  --recompute-modules:{modules}"
    text += '\n  --fp16: false\nMETRICS:\n  - "lm loss"\n'
    found = from_megatron(text, "h100:8x8")
    assert found.plan == imported("--recompute-activations").plan
    assert "recomputation of mlp is not counted" in found.notes


@pytest.mark.parametrize(
    ("more", "field", "value"),
    [
        ("--recompute-activations", "recompute", ("selective",) * 32),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
            "recompute",
            ("full", "none", "none", "none") * 8,
        ),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads", "zero_stage", 2),
        ("--num-distributed-optimizer-instances 4", "shard", 4),
        ("--ddp-bucket-size 100", "bucket_bytes", 400),
    ],
)
def test_a_flag_changes_the_plan(more: str, field: str, value: object):
    """Each flag that matters is used."""
    assert getattr(imported(more).plan, field) == value


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("--pipeline-model-parallel-layout Et*5|(t*9|)*2,t*9L", (5, 9, 9, 9)),
        ("--decoder-first-pipeline-num-layers 5", (5, 9, 9, 9)),
        (
            "--num-layers 30 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
            (7, 8, 8, 7),
        ),
        ("--num-virtual-stages-per-pipeline-rank 2 --decoder-last-pipeline-num-layers 2", (5, 5, 5, 1) * 2),
    ],
)
def test_uneven_stages_are_read(layout: str, expected: tuple[int, ...]):
    """A layout, or the layers of the first or the last rank."""
    text = MIXTRAL.replace("--num-layers-per-virtual-pipeline-stage 4", layout)
    assert from_megatron(text, "h100:8x8").plan.stage_layers == expected


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--fp16", "--bf16 and --fp16 contradict each other"),
        ("--tensor-model-parallel-size 3", "must divide the cluster's 64 devices"),
        ("--recompute-granularity full", "must come with --recompute-method uniform or block"),
        (
            "--recompute-granularity selective --recompute-method block",
            "must come with --recompute-granularity",
        ),
        ("--tp-comm-overlap", "--tp-comm-overlap must come with --sequence-parallel"),
        ("--num-virtual-stages-per-pipeline-rank 2", "contradict each other"),
        ("--tensor-model-paralel-size 2", "did you mean --tensor-model-parallel-size?"),
        ("--window-size 128,0", "asks for attention to a window"),
        ("--num-layers $LAYERS", "--var NAME=VALUE"),
        ("--num-layers x", "--num-layers must be a whole number of at least 1, got 'x'"),
        ("--num-layers 31", "must divide the 31 layers"),
        ("--max-position-embeddings 100", "must be at least --seq-length, got 100 and 4096"),
        ("--moe-layer-freq __import__('os')", "whole numbers, lists and"),
        ("--moe-layer-freq [1]*99999999", "whole numbers, lists and"),
        ("--tokenizer-type HuggingFaceTokenizer", "the vocabulary's size must be known"),
        ("--use-torch-fsdp2", "contradict each other"),
        ("--save 'x", "a quote must close"),
    ],
)
def test_what_contradicts_itself_is_refused(more: str, words: str):
    """One sentence with the flag at fault."""
    with pytest.raises(PlanError) as refusal:
        imported(more)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"source": None}, "arguments must be a text or a sequence of words"),
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1, got 0"),
        ({"vocab_size": "x"}, "vocab_size must be a whole number of at least 1, got 'x'"),
        ({"variables": ["N=1"]}, "variables must be a mapping of names to texts"),
        ({"profile": 3}, "profile must be a SoftwareProfile or its name, got 3"),
    ],
)
def test_requests_that_cannot_be_read_are_refused(asked: dict[str, object], words: str):
    """By the name of what is wrong."""
    with pytest.raises(PlanError) as refusal:
        from_megatron(**{"source": MIXTRAL, "cluster": "h100:8x8", **asked})
    assert words in str(refusal.value)


@pytest.mark.parametrize("export", [to_megatron, to_torchtitan])
def test_steps_are_a_whole_number(export: Callable[..., object]):
    """At least one, for either framework."""
    with pytest.raises(PlanError, match="steps must be a whole number of at least 1, got 0"):
        export(made(), steps=0)


def test_flags_of_one_s_own_are_named():
    """Unknown ones with what they look like; a variable can be said; the last of two counts."""
    found = imported("--my-own-flag 3 --log-intervals 4 --micro-batch-size 2")
    assert found.unknown == (
        "--my-own-flag is no flag of Megatron-LM",
        "--log-intervals is no flag of Megatron-LM; did you mean --log-interval or --eval-interval?",
    )
    assert found.plan.micro_batch == 2
    assert "--micro-batch-size is given twice: 2 counts" in found.notes
    said = from_megatron(f"N=1\n{MIXTRAL} --micro-batch-size $N", "h100:8x8", variables={"N": "4"})
    assert said.plan.micro_batch == 4


def test_expressions_are_computed_and_never_run():
    """Lists and whole numbers; anything else is refused."""
    assert expression("[0]*2+[1]*3") == [0, 0, 1, 1, 1]
    assert expression("(8 * (2 + 1)) / 5") == 4
    for text in ("1 ** 9", "x", "[1]*[1]", "1/0", "9" * 20_000, "(" * 3000):
        with pytest.raises(PlanError):
            expression(text)


def test_words_keep_what_quotes_and_arrays_hold():
    """Quoted words stay whole, but for an item that holds a flag with its values; comments are left out."""
    text = 'A=(--split \'9 1\' "--lr 1e-4") # --bf16\npython x/pretrain.py ${A[@]} --z="$((2 * 3))"\n'
    assert read_arguments(text).words == ("--split", "9", "1", "--lr", "1e-4", "--z=6")
    assert read_arguments(text.replace("${A[@]}", '"${A[@]}"')).words[1] == "9 1"
    assert read_arguments(text).launcher == ("python",)
