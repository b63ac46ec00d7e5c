"""Encode queries or passages with a bi-encoder: texts in, shards of vectors out.

The corpus is cut into shards of --shard_rows texts whatever the number of processes. Within a
shard, windows of WINDOW texts (the first is shorter) are tokenised by loader workers, ordered by
length, and encoded in batches of at most --tokens_per_batch tokens; rows keep the order of the
input. Neither windows nor batches cross a shard, so any number of processes writes the same bytes
as one (on the same machine, with the same number of threads each), and memory does not grow with
the corpus. The same command finishes a run that was killed: it makes the shards that are missing.

A sparse checkpoint gives CSR shards: one column per term of the vocabulary. With --max_chunks, a
passage gives a vector for each of its chunks (MaxP, see lib/text.py), side by side in its shard,
each with its id. A chunk of padding alone is never encoded (ANCE indexes them).

How texts are read (head, pooling, titles, prompts, lengths) belongs to the checkpoint. A flag that
contradicts it stops the run, unless --override is given. A plain Hugging Face folder states
nothing: it needs --pooling or --head sparse, and gets the defaults of TextFormat (lib/text.py).

Reads   --model, a folder (ours, of sentence-transformers or of Hugging Face) or a name on the hub;
        --input in any format of lib/texts.py
Writes  --output_dir: shard-00000.npy (n, D) or .npz (n, V), shard-00000.ids.txt, ..., meta.json
        last

CPU toy   python encode.py --model ckpt --input corpus.jsonl --kind passage --output_dir vectors
1 GPU     accelerate launch --mixed_precision bf16 encode.py --model ckpt --input corpus.jsonl
          --kind passage ...
N GPUs    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 encode.py ...
"""

import math
import time
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from scipy.sparse import csr_matrix, vstack
from torch.utils.data import Dataset
from tqdm import tqdm

from lib.arguments import arg, identity, parse_args
from lib.checkpoint import checkpoint_folder, load_encoder, model_hash
from lib.cpu import pack_linears, speed_up_attention
from lib.embeddings import finish_embeddings, shard_file, write_shard
from lib.encoder import BiEncoder, Head, SparseBiEncoder
from lib.files import UserError
from lib.launch import claim_output, describe, echo, make_accelerator, run
from lib.loader import load
from lib.text import TextFormat, chunk_ids, format_texts, pad, token_batches
from lib.texts import Texts, open_texts

WINDOW = 8192  # texts that are ordered by length at a time


@dataclass(kw_only=True)
class Args:
    model: str = arg(group="data", help="checkpoint")
    input: str = arg(help="corpus or queries")
    kind: Literal["query", "passage"] = arg(help="decides prompt and length; queries have no title")
    output_dir: str = arg(help="folder for the vectors")
    dtype: Literal["float16", "float32"] | None = arg(
        None, help="how vectors are stored; default float16 for dense ones, float32 for sparse ones"
    )
    shard_rows: int = arg(16384, least=1, help="texts per shard, the unit of work and resumption")
    max_terms: int = arg(0, least=0, help="sparse: keep the N highest weights of a text; 0 = all")
    min_weight: float = arg(0.0, least=0, help="sparse: drop weights up to X (Anserini: 0.005)")
    pooling: str | None = arg(
        None, group="model (default: as the checkpoint states)", help="cls, mean or last_token"
    )
    normalize: bool = arg(False, help="make unit vectors")
    head: Literal["dense", "sparse"] | None = arg(None, help="sparse: use the LM head")
    exclude_special_tokens: bool = arg(False, help="sparse: no maximum over [CLS] and [SEP]")
    title: Literal["none", "space", "sep"] | None = arg(None, help="how titles are joined to texts")
    query_prompt: str | None = arg(None, help="text put before every query")
    passage_prompt: str | None = arg(None, help="text put before every passage")
    max_length: int | None = arg(None, least=3, help="tokens of a text, or of each of its chunks")
    max_chunks: int | None = arg(None, least=1, help="maximum chunks per passage (MaxP 4)")
    max_characters: int | None = arg(
        None, least=0, help="cut passages to N characters first (ANCE 10000); 0 = do not"
    )
    override: bool = arg(False, help="let the flags of this group contradict the checkpoint")
    trust_remote_code: bool = arg(False, help="run Python code that the checkpoint brings along")
    tokens_per_batch: int = arg(
        0, least=0, group="runtime", help="texts x longest; 0 = 2048 on a CPU, 65536 on a GPU"
    )
    num_workers: int = arg(2, least=0, most=256, help="loader processes that turn text into ids")
    dry_run: bool = arg(False, help="show the first inputs, truncation, batches and disk, and stop")


@dataclass
class Windows(Dataset):
    """Span [start, stop) of n texts, m chunks (one for each text, unless passages are cut) -> (the
    id of each chunk's text, (n,) bool: full, so the text may go on, (T,) int32 all tokens, (m,)
    lengths): arrays, which the main process receives faster than lists of lists."""

    texts: Texts
    spans: list[tuple[int, int]]
    kind: str
    form: TextFormat
    tokenizer: Any

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, index):
        start, stop = self.spans[index]
        ids, titles, bodies = zip(*self.texts.stream(start, stop), strict=True)
        rows = list(zip(titles, bodies, strict=True))
        strings = format_texts(rows, self.kind, self.form, self.tokenizer)
        longest, most = self.form.max_length(self.kind), self.form.chunks(self.kind)
        chunks = chunk_ids(strings, self.tokenizer, longest, most)
        full = np.array([len(some) == most and len(some[-1]) == longest for some in chunks])
        ids = [i for i, some in zip(ids, chunks, strict=True) for _ in some]
        tokens = list(chain.from_iterable(chunks))
        lengths = np.fromiter(map(len, tokens), np.int32, len(tokens))
        return ids, full, np.fromiter(chain.from_iterable(tokens), np.int32, lengths.sum()), lengths


def cut(start: int, stop: int, window: int) -> list[tuple[int, int]]:
    """Spans of at most `window` texts. The first is short: encoding begins while the others are
    being tokenised."""
    edges = [start, *range(min(start + max(window // 16, 1), stop), stop, window), stop]
    return list(pairwise(edges))


def to_csr(reps: torch.Tensor | csr_matrix, min_weight: float, max_terms: int) -> csr_matrix:
    """(n, V) on any device, or CSR -> CSR of the weights above `min_weight`, at most `max_terms` of
    a row (0 = all). A NaN stays one."""
    if isinstance(reps, torch.Tensor):
        kept = ~(reps <= min_weight)
        starts = np.cumsum([0, *kept.sum(1).tolist()])
        parts = reps[kept].cpu().numpy(), kept.nonzero()[:, 1].int().cpu().numpy(), starts
        reps = csr_matrix(parts, shape=reps.shape)
    else:
        reps.data[reps.data <= min_weight] = 0
        reps.eliminate_zeros()
    return prune(reps, max_terms) if max_terms else reps


def prune(vectors: csr_matrix, max_terms: int) -> csr_matrix:
    """The `max_terms` highest weights of each row; of equal ones those of the lower terms."""
    row = np.repeat(np.arange(vectors.shape[0]), np.diff(vectors.indptr))
    weights = np.nan_to_num(vectors.data, nan=np.inf)
    order = np.lexsort((-weights, row))  # by row, then weight; stable
    rank = np.arange(vectors.nnz) - vectors.indptr[row[order]]
    vectors.data[order[rank >= max_terms]] = 0
    vectors.eliminate_zeros()
    return vectors


def encode_window(model: BiEncoder, window: tuple, args: Args, budget: int, bar: tqdm):
    """The vectors of an item of Windows, in its order. Batches come longest first; each moves the
    bar by its share of the window's tokens."""
    _, full, tokens, lengths = window
    if args.kind == "query" and model.query_table is not None:
        bar.update(len(full))
        return to_csr(model.query_table.rows(tokens, lengths), args.min_weight, args.max_terms)
    texts = np.split(tokens, np.cumsum(lengths)[:-1])
    batches = token_batches(lengths, budget, model.format.max_length(args.kind))
    cost = np.cumsum([len(rows) * width for rows, width in batches])
    steps = np.diff(cost * len(full) // cost[-1], prepend=0)
    device = next(model.parameters()).device
    parts = []
    for (rows, width), step in zip(batches, steps.tolist(), strict=True):
        batch = pad([texts[row] for row in rows], model.tokenizer, width)
        reps = model.encode(send_to_device(batch, device), args.kind)
        if isinstance(model, SparseBiEncoder):  # a window of dense rows would be a gigabyte
            reps = to_csr(reps, args.min_weight, args.max_terms)
        parts.append(reps)
        bar.update(step)
    order = np.argsort(np.concatenate([rows for rows, _ in batches]))
    if isinstance(parts[0], csr_matrix):
        return vstack(parts, "csr")[order]
    return torch.cat(parts).cpu().numpy()[order]


def store_as(vectors: np.ndarray | csr_matrix, dtype: str, ids: list[str], source: str):
    """Vectors as they are stored. UserError: a number is not finite."""
    sparse = isinstance(vectors, csr_matrix)
    values = vectors.data if sparse else vectors
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        at = int(np.argmin(np.isfinite(stored)))  # of the flat array
        row = np.searchsorted(vectors.indptr, at, "right") - 1 if sparse else at // vectors.shape[1]
        finite = np.isfinite(values).all()
        remedy = "add --dtype float32" if finite else "check the checkpoint, or use fp32"
        raise UserError(f"{source}: the vector of {ids[row]} is not finite — {remedy}")
    if not sparse:
        return stored
    vectors.data = stored  # the last thing done to it: scipy knows no float16
    return vectors


def main():
    # ---- setup
    args = parse_args(Args)
    accelerator = make_accelerator()
    rank, W, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    budget = args.tokens_per_batch or (2048 if device.type == "cpu" else 65536)

    # ---- model and texts
    names = ("title", "query_prompt", "passage_prompt", "max_chunks", "max_characters")
    overrides = {name: getattr(args, name) for name in names}
    overrides[f"max_{args.kind}_length"] = args.max_length
    source = checkpoint_folder(args.model)
    texts = open_texts(args.input)
    excluded = args.exclude_special_tokens
    head = Head(args.pooling, args.head, normalize=args.normalize, exclude_special_tokens=excluded)
    model = load_encoder(source, head, overrides, not args.override, args.trust_remote_code)
    model.to(device)
    form, tokenizer, sparse = model.format, model.tokenizer, isinstance(model, SparseBiEncoder)
    if not sparse and (args.max_terms or args.min_weight):
        raise UserError(f"{source}: a dense checkpoint — leave --max_terms and --min_weight out")
    limit, chunks = form.max_length(args.kind), form.chunks(args.kind)
    dtype = args.dtype or ("float32" if sparse else "float16")
    inputs = {
        "model_hash": model_hash(source),
        "input_fingerprint": texts.fingerprint,
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "tokens_per_batch": budget,
    }
    meta = {
        **inputs,
        "model": args.model,
        "head": "sparse" if sparse else "dense",
        "max_terms": args.max_terms,
        "min_weight": args.min_weight,
        "kind": args.kind,
        "pooling": model.pooling,
        "normalized": model.normalized,
        "dim": model.dim,
        "title": form.title if args.kind == "passage" else None,
        "prompt": form.prompt(args.kind),
        "max_length": limit,
        "max_chunks": chunks,
        "max_characters": form.max_characters if args.kind == "passage" else 0,
        "input": args.input,
        "count": len(texts),
        "dtype": dtype,
        "shard_rows": args.shard_rows,
    }
    shards = list(pairwise([*range(0, len(texts), args.shard_rows), len(texts)]))
    sample = [(0, min(1000, len(texts)))]
    _, full, tokens, lengths = Windows(texts, sample, args.kind, form, tokenizer)[0]
    first = tokenizer.decode(tokens[: lengths[0]])
    facts = {
        "model": f"{args.model}, {model.pooling} pooling, {model.dim} dimensions",
        "normalised": model.normalized,
        "texts": f"{len(texts)} of {args.input}",
        "prompt": repr(meta["prompt"]),
        "title": meta["title"],
        "max_length": limit,
        "first input": first if len(first) < 300 else f"{first[:200]} ... {first[-80:]}",
        "chunks": f"{len(lengths) / len(full):.2f} per text, {chunks} at most",
        "at max_length": f"{full.mean():.1%} of the first {len(full)} texts",
        "running on": describe(accelerator),
        "stored as": f"{dtype}, {len(shards)} shard(s) of {args.shard_rows} texts",
    }
    if args.dry_run:
        times = len(texts) / len(full)
        batches = len(token_batches(lengths, budget, limit)) * times
        facts["batches"] = f"about {math.ceil(batches)}"
        size = len(lengths) * times * model.dim * np.dtype(dtype).itemsize
        facts["disk"] = "8 bytes per weight" if sparse else f"{size / 1e9:.2f} GB"
        return echo(accelerator, "dry run", facts)
    if claim_output(accelerator, args.output_dir, identity(args, inputs), "meta.json"):
        return
    echo(accelerator, "encoding", facts)

    # ---- encode
    folder = Path(args.output_dir)
    missing = [s for s in range(len(shards)) if not (folder / shard_file(s, sparse)).is_file()]
    accelerator.wait_for_everyone()  # all have listed what is missing before the first adds to it
    mine = missing[rank::W]
    spans = [cut(start, stop, WINDOW) for start, stop in (shards[shard] for shard in mine)]
    windows = Windows(texts, list(chain.from_iterable(spans)), args.kind, form, tokenizer)
    loader = load(windows, tuple, None, args.num_workers)
    total = sum(shards[shard][1] - shards[shard][0] for shard in mine)
    bar = tqdm(total=total, unit=" texts", disable=not accelerator.is_main_process)
    packed = {"no": torch.float32, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    if device.type == "cpu" and packed:
        pack_linears(model.backbone.base_model, packed)
        speed_up_attention(model.backbone)

    limited, terms, clock = 0, 0, time.perf_counter()
    with torch.inference_mode(), accelerator.autocast():  # one context: weights are cast once
        for shard, parts in zip(mine, spans, strict=True):
            vectors, ids = [], []
            for window in islice(loader, len(parts)):
                vectors.append(encode_window(model, window, args, budget, bar))
                ids += window[0]
                limited += int(window[1].sum())
            vectors = vstack(vectors, "csr") if sparse else np.concatenate(vectors)
            terms += vectors.nnz if sparse else 0
            write_shard(folder, shard, store_as(vectors, dtype, ids, args.input), ids)
    bar.close()

    # ---- done
    done = gather_object([(total, limited, terms)])  # when all have written their shards
    if accelerator.is_main_process:
        seconds = time.perf_counter() - clock
        texts_done, limited, terms = map(sum, zip(*done, strict=True))
        if chunks > 1:
            paths = folder.glob("shard-*.npy")
            meta["vectors"] = sum(len(np.load(path, mmap_mode="r")) for path in paths)
        finish_embeddings(folder, meta)
        each = f", {terms / max(texts_done, 1):.1f} terms each" if sparse else ""
        speed = f"{seconds:.1f} s ({texts_done / max(seconds, 1e-9):.0f} texts/s)"
        share = f"{limited / max(texts_done, 1):.1%} at max_length"
        print(f"{texts_done} texts in {speed}, {share}{each} -> {folder}")


if __name__ == "__main__":
    run(main)
