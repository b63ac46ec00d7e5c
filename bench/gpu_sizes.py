"""What bench/gpu.py measures on a device: sizes, and operations by which its speed is judged."""

import re
from dataclasses import dataclass

# words in the name of a device: (peak of dense bf16 or fp16 products in TFLOPS, memory
# bandwidth in TB/s), both as its maker states them. The first that fits counts.
PEAKS = {
    "B200": (2250, 8.0),
    "H200": (989, 4.8),
    "GH200": (989, 4.0),
    "H100 PCIe": (756, 2.0),
    "H100 NVL": (835, 3.9),
    "H100": (989, 3.35),
    "A100-SXM4-80GB": (312, 2.04),
    "A100 80GB PCIe": (312, 1.94),
    "A100": (312, 1.56),
    "A10G": (70, 0.6),
    "A10": (125, 0.6),
    "A30": (165, 0.93),
    "A40": (150, 0.7),
    "RTX A6000": (155, 0.77),
    "L40S": (362, 0.86),
    "L40": (181, 0.86),
    "L4": (121, 0.3),
    "4090": (165, 1.01),
    "3090": (71, 0.94),
    "V100": (125, 0.9),
    "T4": (65, 0.32),
}
# objective: (layers of its decoder, labels of encoder and decoder by tokens of a text, whether the
# logits of all positions are computed)
SHAPES = {
    "mlm": (0, 0.3, False),
    "bow": (0, 0.3, False),
    "retromae": (1, 1.3, False),
    "dupmae": (1, 1.3, True),
    "lexmae": (2, 0.8, True),
    "seed": (3, 1.15, False),
    "condenser": (2, 0.3, False),
    "cocondenser": (2, 0.3, False),
}
TOY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
MSMARCO = 8_841_823  # passages


def peaks_of(name: str) -> tuple[float, float] | tuple[None, None]:
    """The entry of PEAKS for a device's name."""
    for words, peaks in PEAKS.items():
        if re.search(rf"\b{words}\b", name):
            return peaks
    return None, None


@dataclass
class Sizes:
    """What is measured. share: of the published batch"""

    share: float
    vocabulary: int
    model: dict
    batch: int  # blocks of pre-training
    length: int  # tokens of a block
    queries: int  # of a batch of fine-tuning
    large: int  # the same with GradCache
    group: int  # passages per query
    passage: int  # tokens
    encoded: int  # passages
    searched: int
    asked: int
    dimension: int
    depth: int
    sparse: int  # passages of sparse search


def sizes_for(memory: float, disk: float, tiny: bool) -> Sizes:
    """Sizes for a device's memory and a free disk, in GB."""
    if tiny:
        return Sizes(
            share=0.0,
            vocabulary=600,
            model=TOY,
            batch=4,
            length=40,
            queries=2,
            large=4,
            group=2,
            passage=30,
            encoded=40,
            searched=3000,
            asked=20,
            dimension=16,
            depth=10,
            sparse=2000,
        )
    share = 1.0 if memory > 30 else 0.5 if memory > 20 else 0.25 if memory > 14 else 0.125
    fits = int(min(MSMARCO, 0.5 * disk * 1e9 / 1536, 0.6 * memory * 1e9 / 1536))
    return Sizes(
        share=share,
        vocabulary=30_522,
        model=BASE,
        batch=int(256 * share),
        length=150,
        queries=int(16 * share),
        large=int(128 * share),
        group=16,
        passage=140,
        encoded=int(65_536 * share),
        searched=fits,
        asked=6_980,
        dimension=768,
        depth=1000,
        sparse=250_000,
    )


def layers_flops(model: dict, layers: int, length: float) -> float:
    """Floating-point operations per token of a forward pass; a multiplication with an addition is
    two."""
    D, inner = model["hidden_size"], model["intermediate_size"]
    return layers * (2 * (4 * D * D + 2 * D * inner) + 4 * length * D)


def pretraining_flops(sizes: Sizes, objective: str) -> float:
    """The same per token of a training step: the backward pass is twice the forward pass. A decoder
    counts as full layers, and maxima over logits without a backward pass."""
    model = sizes.model
    D, V = model["hidden_size"], sizes.vocabulary
    decoder, labels, pooled = SHAPES[objective]
    layers = layers_flops(model, model["num_hidden_layers"] + decoder, sizes.length)
    return 3 * (layers + labels * 2 * (D * D + D * V)) + pooled * 2 * D * V
