"""What decides a run, in one dataclass; the command line's options are made from it."""

from dataclasses import dataclass, field

from ..models import SmallLMConfig
from ..models.small_lm import PRESETS
from ..nn import FEATURE_MAPS
from ..nn.hybrid_attention import POSITIVE_MAPS
from ..nn.linear_attention import MODES
from ..ops.hybrid.function import ALIGNMENTS
from ..validation import expect


def _option(default, text: str, kind: type | None = None):
    return field(default=default, metadata={"help": text, "type": kind or type(default)})


# The options that say what the layers are, named as the model's.
LINEAR = ("linear_mode", "linear_feature_map")
HYBRID = ("hybrid_feature_map", "hybrid_feature_dim", "hybrid_alignment")
EXPERTS = tuple(name for name in SmallLMConfig.__dataclass_fields__ if name.startswith("expert"))
LAYERS = ("pattern", *LINEAR, *HYBRID, *EXPERTS)


@dataclass(frozen=True)
class Settings:
    """A run. Two runs of equal settings on the same machine and data compute the same bits.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    preset: str = _option("1m", f"model size: {', '.join(PRESETS)}")
    pattern: str = _option(
        "SSSF", "one letter a layer, cycled: S sliding window, F full, L linear, H hybrid attention"
    )
    linear_mode: str = _option("gated_delta", f"what L layers are: {', '.join(MODES)}")
    linear_feature_map: str | None = _option(
        None, f"of L layers in mode linear: {', '.join(FEATURE_MAPS)} (default: elu)", str
    )
    hybrid_feature_map: str = _option("hedgehog", f"of H layers: {', '.join(POSITIVE_MAPS)}")
    hybrid_feature_dim: int | None = _option(
        None, "what the learned maps of H layers project to (default: the map's)", int
    )
    hybrid_alignment: str = _option("sliding", f"of the window of H layers: {', '.join(ALIGNMENTS)}")
    experts: int = _option(0, "experts in place of a layer's SwiGLU; 0: none")
    expert_top_k: int = _option(2, "experts of a token")
    expert_hidden: int | None = _option(
        None, "hidden channels of an expert (default: the preset's / expert-top-k)", int
    )
    expert_shared: int = _option(0, "hidden channels of the shared experts; 0: none")
    expert_every: int = _option(1, "every how manyth layer has experts")
    expert_balance: float = _option(0.01, "coefficient of the load-balance loss")
    expert_z: float = _option(0.001, "coefficient of the router's z-loss")
    expert_bias_rate: float = _option(
        0.0, "how far a step moves the selection bias towards equal loads; 0: no bias"
    )
    window: int | None = _option(
        None, "keys a query of an S layer sees, or an H layer is near to (default: the preset's)", int
    )
    data: tuple[str, ...] = _option(
        (), "UTF-8 files, globs, or folders (*.txt, *.md, *.py below them) (default: Python's own library)"
    )
    steps: int = _option(300, "optimizer steps; the learning rate falls to a tenth over them")
    batch_size: int = _option(12, "sequences of a micro-batch")
    seq_len: int = _option(256, "bytes of a sequence")
    accumulate: int = _option(1, "micro-batches of a step")
    lr: float | None = _option(None, "peak learning rate (default: 0.5 / the model's width)", float)
    warmup: int = _option(20, "steps over which the learning rate rises")
    weight_decay: float = _option(0.1, "AdamW's, on matrices only")
    clip: float = _option(1.0, "largest norm of the gradient")
    seed: int = _option(0, "of the initial values and of the batches")
    dtype: str = _option("float32", "float32, or bfloat16 by autocast")
    eval_every: int = _option(100, "steps between two validations")
    eval_tokens: int = _option(65536, "bytes of held-out text a validation reads")
    log_every: int = _option(10, "steps between two lines of metrics.jsonl")
    save_every: int = _option(100, "steps between two checkpoints")

    def __post_init__(self):
        sizes = ("batch_size", "seq_len", "accumulate", "eval_tokens")
        for name in ("steps", "eval_every", "log_every", "save_every", *sizes):
            value = getattr(self, name)
            expect(type(value) is int and value >= 1, name, value, "an int >= 1")
        for name in ("warmup", "seed"):
            value = getattr(self, name)
            expect(type(value) is int and value >= 0, name, value, "an int >= 0")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            default = name == "lr" and value is None
            expect(default or 0 < value < float("inf"), name, value, "a finite number > 0")
        decay = self.weight_decay
        expect(0 <= decay < float("inf"), "weight_decay", decay, "a finite number >= 0")
        expect(self.dtype in ("float32", "bfloat16"), "dtype", self.dtype, "'float32' or 'bfloat16'")
        self.model_config()

    def model_config(self) -> SmallLMConfig:
        """The model these settings train."""
        changes = {name: getattr(self, name) for name in LAYERS}
        window = {} if self.window is None else {"window": self.window}
        return SmallLMConfig.preset(self.preset, **changes, **window)

    @property
    def layers(self) -> str:
        """The pattern, and what its layers are: `SL-gla`, `H-hedgehog-sliding`, `SSSF-8experts`."""
        names = (LINEAR if "L" in self.pattern else ()) + (HYBRID if "H" in self.pattern else ())
        values = (getattr(self, name) for name in names)
        parts = [self.pattern, *(str(value) for value in values if value is not None)]
        return "-".join(parts + ([f"{self.experts}experts"] if self.experts else []))

    @property
    def peak_lr(self) -> float:
        """`lr`, or by default what AdamW stands for matrices of this width."""
        return 0.5 / self.model_config().dim if self.lr is None else self.lr
