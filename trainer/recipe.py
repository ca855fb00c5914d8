"""What a training run is told: one YAML file, checked before anything is read or computed."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ckptbridge.trainer.section import AnyPath, Count, PositiveFloat, PositiveInt, Section, Seed, Share
from ckptbridge.trainer.upcycle_recipe import UpcycleSection


class ModelSection(Section):
    """Where the weights come from."""

    init_from: str
    """A checkpoint folder (Hugging Face or Megatron-Core), or a Hub id such as `Qwen/Qwen3-0.6B`."""
    revision: str | None = None
    """The branch, tag or commit of a Hub id; a folder has none."""
    hf_config: AnyPath | None = None
    """A config.json for a Megatron-Core checkpoint that does not say enough about itself; of no other."""
    upcycle: UpcycleSection | None = None
    """Make a mixture of experts of the model while it is loaded; nothing of it is written before a checkpoint is."""

    @model_validator(mode="after")
    def _no_report(self) -> Self:
        if self.upcycle is not None and (self.upcycle.probe is not None or not self.upcycle.report):
            raise ValueError(
                "upcycle.probe and upcycle.report belong to `ckptbridge upcycle`: a run logs the held-out loss before "
                "its first step"
            )
        return self


class DataSection(Section):
    """The text, how it becomes tokens, and how tokens become batches."""

    text: list[str] = Field(min_length=1)
    """Files, globs (`src/**/*.py`) or folders (every text file below). Each file is a document."""
    document_separator: Annotated[str, Field(min_length=1)] | None = None
    """Cut every file into documents at this string; without it (null) a file is one document."""
    tokenizer: str | None = None
    """A folder with tokenizer files; by default the one that came with the model."""
    end_of_text: bool = True
    """Put the tokenizer's end-of-sequence token after each document."""
    sequence_length: PositiveInt = 1024
    """Tokens a sequence; each is predicted from those before it in the same sequence."""
    micro_batch_size: PositiveInt = 1
    """Sequences that pass the model at once; memory grows with it."""
    global_batch_size: PositiveInt = 8
    """Sequences per update of the weights: a multiple of micro_batch_size."""
    held_out_fraction: Share = 0.02
    """The share of documents that is never trained on and measures the held-out loss; 0 turns that off."""
    max_documents: PositiveInt | None = None
    """Take only so many documents (drawn by the seed)."""
    max_bytes: PositiveInt | None = None
    """Take only about so many bytes of text (drawn by the seed)."""
    seed: Seed = 0
    """Decides which documents are taken, which are held out, and the order of sequences."""

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return self


class OptimizerSection(Section):
    """AdamW. Norms and biases are not decayed; every matrix is, routers and embeddings too."""

    lr: PositiveFloat = 3e-5
    """The highest learning rate, reached at the end of the warmup."""
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.95)
    """How slowly the means of the gradient and of its square move."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the mean square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Each step takes lr * weight_decay of a matrix away."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """The largest allowed norm of all gradients together; 0 turns clipping off."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """What Adam's two moments are kept in: in bf16 they take 4 bytes a parameter less (checkpoints hold fp32)."""
    norm_in_products: bool = False
    """Experts' gradients are squared by the products that write them, so that the norm does not read them again."""


class ScheduleSection(Section):
    """The learning rate over the run: linear warmup, then half a cosine."""

    total_steps: PositiveInt
    """Updates of the weights in all."""
    warmup_steps: Count = 0
    """Steps until the learning rate is at its highest."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """The learning rate that the cosine falls to; it would be reached one step after the last."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.total_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below total_steps {self.total_steps}")
        return self


class MoeSection(Section):
    """Mixtures of experts."""

    aux_loss_coeff: Annotated[float, Field(ge=0)] | None = None
    """Weight of the load-balancing loss (summed over layers); by default what the model's config says."""
    z_loss_coeff: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the z-loss, the mean square of the logsumexp of a router's logits (summed over layers)."""
    bias_update_rate: Annotated[float, Field(ge=0)] = 0.0
    """How far expert biases (of sigmoid routers) move after each step, towards an even spread; 0 leaves them alone."""
    capacity_factor: PositiveFloat | None = None
    """The most rows an expert takes of a micro-batch, as a multiple of its even share; without it none is dropped."""
    drop_policy: Literal["probs", "position"] = "probs"
    """What an expert drops beyond its capacity: the choices of the lowest weight, or those of the latest tokens."""
    pad_to_capacity: bool = False
    """Give every expert as many rows as its capacity, the last of them zeros."""

    @model_validator(mode="after")
    def _capacity_to_pad_to(self) -> Self:
        if self.pad_to_capacity and self.capacity_factor is None:
            raise ValueError("pad_to_capacity needs a capacity_factor that says how many rows an expert has")
        return self


class CheckpointSection(Section):
    """Checkpoints of the run, in Megatron-Core's torch_dist format, weights and optimizer."""

    save_every: Count = 0
    """Steps between checkpoints; 0 saves only the last step."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay."""


class ExportSection(Section):
    """What is written when the last step is done."""

    hf: bool = True
    """Write `hf/` in the run folder, loadable by AutoModelForCausalLM."""


class EvaluationSection(Section):
    """The loss on held-out documents, before the first step, every so often, and after the last."""

    every: Count = 0
    """Steps between evaluations; 0 evaluates only before the first and after the last step."""
    batches: PositiveInt = 8
    """Micro-batches an evaluation; always the same ones."""


class MemorySection(Section):
    """What the layers keep for their backward pass; losses are the same with every choice."""

    recompute: Literal["none", "selective", "full"] = "none"
    """`selective`: what norms and activation functions gave is computed again; `full`: every layer is."""
    offload: Literal["none", "activations"] = "none"
    """`activations`: they wait in the host's pinned memory, copied while the GPU computes."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.recompute == "full" and self.offload != "none":
            raise ValueError(
                "with recompute full there is nothing to offload: only layers' inputs are kept; take one of both"
            )
        return self


def _switch(value: object) -> object:
    """YAML 1.1 reads `on` and `off` as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class KernelsSection(Section):
    """Which implementation of the fused operations runs."""

    backend: Literal["auto", "reference", "torch", "triton", "transformer_engine"] = "auto"
    """`auto`: Triton's on a GPU, the plain definition on a CPU; `transformer_engine`: NVIDIA's, where installed."""
    attention: Literal["auto", "cudnn", "flash", "flash3", "flash4", "math"] = "auto"
    """`auto`: cuDNN's on a GPU in bf16, else what torch takes; `flash3` and `flash4` where they are installed."""
    products: Literal["auto", "reference", "torch", "triton", "quack", "transformer_engine"] = "auto"
    """Who multiplies in the experts. `auto`: the fastest measured; the last two where they are installed."""
    graph: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """Replay each step as one CUDA graph. `auto`: in bf16 on a GPU, unless the model makes the host wait."""


class Recipe(Section):
    """A training run."""

    run_folder: AnyPath
    """Everything of the run lies here; run the same recipe again to resume it. Relative paths start where you stand."""
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    moe: MoeSection = MoeSection()
    checkpoint: CheckpointSection = CheckpointSection()
    export: ExportSection = ExportSection()
    evaluation: EvaluationSection = EvaluationSection()
    kernels: KernelsSection = KernelsSection()
    memory: MemorySection = MemorySection()
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` computes in bfloat16 and keeps fp32 weights, gradients and moments in the optimizer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is a GPU if there is one."""
    threads: PositiveInt | None = None
    """CPU threads; by default as many as torch takes. The same number gives the same bits."""
    seed: Seed = 0
    """Seeds torch's own random numbers."""

    @model_validator(mode="after")
    def _rates_fit(self) -> Self:
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(f"schedule.min_lr {self.schedule.min_lr} is above optimizer.lr {self.optimizer.lr}")
        return self


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors that complete and check YAML."""
    return Recipe.model_json_schema()
