"""Passages per second of encode.py against SentenceTransformer.encode, on the same texts with the
same checkpoint.

    python -m bench.encode --model DIR --corpus FILE [--precision bf16] [--limit 1000] [--sparse]

Each run is a process of its own, in turns, with the same number of threads. Timed is encoding
alone, tokenisation included: no imports, no loading; ours also writes its shards to disk. Both in
fp32, or both in bf16: ours under autocast, the peer's weights cast to bf16 (`dtype`), its faster
way, or under autocast with --peer_autocast. Printed: medians, their ratio, peaks of resident memory
(ours: of the largest of its processes), also less what imports alone take, and how far the vectors
are apart. --sparse: of a SparseEncoder folder, against SparseEncoder.encode.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.sparse import load_npz

from lib.embeddings import Embeddings
from lib.texts import open_texts, write_texts

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = {
    "ours": "import encode",
    "theirs": "from sentence_transformers import SentenceTransformer, SparseEncoder",
}
PEER = """
import json, sys, time
from contextlib import nullcontext
import numpy as np, torch
from sentence_transformers import SentenceTransformer, SparseEncoder
model, corpus, out, precision, size = sys.argv[1:5] + [int(sys.argv[5])]
kwargs = {"dtype": torch.bfloat16 if precision == "bf16" else torch.float32}
sparse = "sparse" in sys.argv[6:]
model = (SparseEncoder if sparse else SentenceTransformer)(model, model_kwargs=kwargs)
texts = [json.loads(line) for line in open(corpus)]
texts = [f"{t['title']} {t['text']}" if t.get("title") else t["text"] for t in texts]
context = nullcontext()
if precision == "autocast":
    context = torch.autocast(model.device.type, torch.bfloat16)
model.encode(texts[:size], batch_size=size)
began = time.perf_counter()
with context:
    vectors = model.encode(texts, batch_size=size)
print("seconds", time.perf_counter() - began)
if sparse:
    import scipy.sparse
    vectors = vectors.float().coalesce()
    parts = vectors.values().numpy(), tuple(vectors.indices().numpy())
    vectors = scipy.sparse.csr_matrix(parts, shape=tuple(vectors.shape))
    scipy.sparse.save_npz(out, vectors, compressed=False)
else:
    np.save(out, np.asarray(vectors, dtype=np.float32))
"""


def seconds(command: list, pattern: str, **environment) -> tuple[float, float]:
    """(seconds that it prints, peak resident MB of it or of its largest child)"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment, stdout=output, stderr=output
        )
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        printed = output.read()
    if status:
        sys.exit(printed)
    return float(re.search(pattern, printed)[1]), usage.ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a sentence-transformers folder")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--peer_autocast", action="store_true", help="bf16 of the peer by autocast")
    parser.add_argument(
        "--peer_batch_size", type=int, default=32, help="texts per batch of the peer (its default)"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="take so many passages, evenly spread; 0 = all"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sparse", action="store_true", help="--model is a SparseEncoder folder")
    args = parser.parse_args()
    corpus = open_texts(args.corpus)
    rows = np.linspace(0, len(corpus) - 1, args.limit or len(corpus)).astype(int)
    found, peer_precision = (
        {"ours": [], "theirs": []},
        "autocast" if args.peer_autocast else args.precision,
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_texts(folder / "corpus.jsonl", ((corpus.id(row), *corpus[row]) for row in rows))
        for turn in range(args.rounds):
            ours = [
                "encode.py",
                "--model",
                args.model,
                "--input",
                folder / "corpus.jsonl",
                "--kind",
                "passage",
            ]
            ours = [
                ROOT / ours[0],
                *ours[1:],
                "--dtype",
                "float32",
                "--output_dir",
                folder / f"vectors{turn}",
            ]
            mixed = {"fp32": "no", "bf16": "bf16"}[args.precision]
            cache = {"ISTHMUS_CACHE": str(folder / "cache")}
            found["ours"].append(
                seconds(ours, r"texts in ([\d.]+) s", ACCELERATE_MIXED_PRECISION=mixed, **cache)
            )
            stored = folder / ("peer.npz" if args.sparse else "peer.npy")
            peer = args.model, folder / "corpus.jsonl", stored, peer_precision, args.peer_batch_size
            peer += ("sparse",) * args.sparse
            found["theirs"].append(seconds(["-c", PEER, *peer], r"seconds ([\d.]+)"))
            print(json.dumps({name: values[-1] for name, values in found.items()}), flush=True)
        ours = Embeddings(folder / "vectors0").take(np.arange(len(rows)))
        theirs = load_npz(stored).astype(np.float32) if args.sparse else np.load(stored)
    median, peak = (
        {name: statistics.median(one[i] for one in runs) for name, runs in found.items()}
        for i in (0, 1)
    )
    print(f"{len(rows)} passages, {args.precision}: ours {len(rows) / median['ours']:.1f} texts/s, "
          f"theirs {len(rows) / median['theirs']:.1f}, "
          f"ratio {median['theirs'] / median['ours']:.2f}")  # fmt: skip
    alone = {
        name: peak[name] - seconds(["-c", f"{imports}; print('seconds 0')"], r"seconds (\d)")[1]
        for name, imports in IMPORTS.items()
    }
    for what, one in (("peak memory", peak), ("without the imports", alone)):
        print(
            f"{what}: ours {one['ours']:.0f} MB, theirs {one['theirs']:.0f} MB, "
            f"{one['ours'] / one['theirs']:.2f}x"
        )
    if args.sparse:
        ours, theirs = ours.toarray(), theirs.toarray()
        print(f"terms of a passage: {(ours > 0).sum(1).mean():.1f}")
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    print(
        f"vectors: largest difference {np.abs(ours - theirs).max():.1e}, "
        f"lowest cosine {cosine.min():.6f}"
    )


if __name__ == "__main__":
    main()
