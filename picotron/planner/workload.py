"""What is trained and how: batch, precision and optimizer, and the bytes that each precision keeps."""

from __future__ import annotations

from typing import Literal

from attrs import Attribute, evolve, field, frozen

from picotron.errors import PlanError
from picotron.planner.validators import between, is_between, must_be, one_of, whole

Precision = Literal["bf16", "fp16", "fp32", "fp64", "fp8", "mxfp8", "nvfp4"]
OptimizerName = Literal["adamw", "sgd"]
GradientDtype = Literal["fp32", "bf16"]


@frozen(kw_only=True)
class Format:
    """Bytes per element under one precision; ``main`` is 0 where the parameters are their own main copy.

    ``gradient`` is what gradients are accumulated and kept in, ``reduce`` what they travel in between ranks.
    ``product`` is the format in which the operands of the layers' linear products are multiplied.
    """

    compute: int
    gradient: int
    reduce: int
    main: int
    moment: int
    product: str


_MIXED = {"compute": 2, "gradient": 4, "reduce": 4, "main": 4, "moment": 4}
FORMATS: dict[str, Format] = {
    "bf16": Format(**_MIXED, product="bf16"),
    "fp16": Format(**_MIXED, product="fp16"),
    "fp32": Format(compute=4, gradient=4, reduce=4, main=0, moment=4, product="fp32"),
    "fp64": Format(compute=8, gradient=8, reduce=8, main=0, moment=8, product="fp64"),
    "fp8": Format(**_MIXED, product="fp8"),
    "mxfp8": Format(**_MIXED, product="fp8"),
    "nvfp4": Format(**_MIXED, product="fp4"),
}
MOMENTS: dict[str, int] = {"adamw": 2, "sgd": 0}
DTYPE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2}

# A moving average's decay: at 1 it would never move.
_DECAY = must_be("a number in [0.0, 1.0)", lambda value: is_between(value, 0, 1) and value != 1)
_dtype = must_be(
    "None or one of fp32, bf16",
    lambda value: value is None or (isinstance(value, str) and value in DTYPE_BYTES),
)


@frozen(kw_only=True)
class Workload:
    """What is trained, and how: a step takes ``global_batch`` sequences of ``seq_len`` tokens.

    ``precision`` bf16 keeps fp32 main weights and fp32 gradients; so do the lower ones, in which only the
    operands of the layers' linear products are narrower. ``gradient_dtype`` is what gradients are accumulated
    in: left out, fp32 (fp64 in fp64); bf16 where the precision computes in 16 bits. ``reduce_dtype`` is what
    they travel in between ranks: left out, as they are kept; else they are cast on the way there and back.
    A step whose loss or gradient norm is not finite changes nothing and is counted; ``max_skipped_steps`` of
    them in a row are passed over, one more ends the run (0: the first). The learning rate rises linearly over
    ``warmup_steps`` and falls along a cosine to ``min_learning_rate_ratio`` of itself at ``decay_steps``
    (0: it stays). ``weight_decay`` applies to matrices only, embeddings among them: biases and norms do
    not decay. ``max_grad_norm`` 0 turns clipping off.
    """

    global_batch: int = field(validator=whole(1))
    seq_len: int = field(validator=whole(1))
    precision: Precision = field(default="bf16", validator=one_of(Precision))
    optimizer: OptimizerName = field(default="adamw", validator=one_of(OptimizerName))
    learning_rate: float = field(default=3e-4, validator=between(0.0))
    weight_decay: float = field(default=0.1, validator=between(0.0))
    beta1: float = field(default=0.9, validator=_DECAY)
    beta2: float = field(default=0.95, validator=_DECAY)
    warmup_steps: int = field(default=0, validator=whole(0))
    decay_steps: int = field(default=0, validator=whole(0))
    min_learning_rate_ratio: float = field(default=0.1, validator=between(0.0, 1.0))
    max_grad_norm: float = field(default=1.0, validator=between(0.0))
    gradient_dtype: GradientDtype | None = field(default=None, validator=_dtype)
    reduce_dtype: GradientDtype | None = field(default=None, validator=_dtype)
    max_skipped_steps: int = field(default=3, validator=whole(0))
    seed: int = field(default=0, validator=whole(0, 2**63 - 1))

    @gradient_dtype.validator
    def _as_precise_as_computed(self, _: Attribute[object], value: str | None) -> None:
        form = FORMATS[self.precision]
        if value is None or value == self.precision or form.compute == 2:
            return
        raise PlanError(
            f"gradient_dtype must hold what {self.precision} computes, got {value!r}; "
            "leave it out, or give reduce_dtype for what travels"
        )

    @property
    def format(self) -> Format:
        """Bytes per element of everything that is kept, and of what travels."""
        form = FORMATS[self.precision]
        gradient = form.gradient if self.gradient_dtype is None else DTYPE_BYTES[self.gradient_dtype]
        reduce = gradient if self.reduce_dtype is None else DTYPE_BYTES[self.reduce_dtype]
        return evolve(form, gradient=gradient, reduce=reduce)
