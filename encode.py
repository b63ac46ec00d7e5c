"""Encode queries or passages with a bi-encoder: texts in, shards of vectors out.

The corpus is cut into shards of --shard_rows texts whatever the number of processes. Within a
shard, windows of --window texts (the first is shorter) are tokenised by loader workers, ordered by
length, and encoded in batches of at most --tokens_per_batch tokens; rows keep the order of the
input. Neither windows nor batches cross a shard, so any number of processes writes the same bytes
as one (on the same machine, with the same number of threads each), and memory does not grow with
the corpus. A run that died is finished by the same command: shards that exist are kept, if model,
input and settings are the same.

A sparse checkpoint gives CSR shards: one column per term of the vocabulary. --max_terms and
--min_weight prune them.

With --max_chunks, a passage gives a vector for each of its chunks (MaxP, see lib/text.py), side by
side in its shard; its id is on the line of each. A chunk of padding alone is never encoded (ANCE
indexes them).

How texts are read (head, pooling, titles, prompts, lengths) belongs to the checkpoint. A flag that
differs from what the checkpoint states stops the run; --override does it anyway. A plain Hugging
Face folder states nothing but --pooling is needed, or --head sparse; it gets TextFormat's defaults
(lib/text.py).

Reads   --model (our folder, a sentence-transformers folder, dense or sparse, a Hugging Face folder,
        a hub name);
        --input in any format of lib/texts.py
Writes  --output_dir: shard-00000.npy (n, D) or .npz (n, V), shard-00000.ids.txt, ..., progress.json
        while it runs,
        meta.json last

CPU toy   python encode.py --model ckpt --input corpus.jsonl --kind passage --output_dir vectors
1 GPU     accelerate launch --mixed_precision bf16 encode.py --model ckpt --input corpus.jsonl
          --kind passage ...
N GPUs    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 encode.py ...
"""

import math
import os
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from scipy.sparse import csr_matrix, vstack
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lib.arguments import arg, parse_args
from lib.checkpoint import checkpoint_folder, load_encoder, model_hash
from lib.cpu import pack_linears, speed_up_attention
from lib.embeddings import finish_embeddings, shard_file, write_shard
from lib.encoder import SparseBiEncoder
from lib.files import UserError, read_json, write_json
from lib.launch import claim_output, describe, echo, end_with_parent, make_accelerator, run
from lib.text import TextFormat, chunk_ids, format_texts, pad, token_batches
from lib.texts import open_texts


@dataclass(kw_only=True)
class Args:
    model: str = arg(group="data", help="checkpoint")
    input: str = arg(help="corpus or queries")
    kind: Literal["query", "passage"] = arg(help="decides prompt and length; queries have no title")
    output_dir: str = arg(help="folder for the vectors")
    dtype: Literal["float16", "float32"] | None = arg(
        None, help="how vectors are stored; default float16 for dense ones, float32 for sparse ones"
    )
    max_terms: int = arg(0, least=0, help="sparse: keep the N highest weights of a text; 0 = all")
    min_weight: float = arg(
        0.0, least=0, help="sparse: drop weights up to this (Anserini's factor of 100: 0.005)"
    )
    pooling: str = arg(
        None,
        group="model (default: as the checkpoint states)",
        help="needed where the checkpoint states no pooling",
    )
    normalize: bool = arg(False, help="make unit vectors, where the checkpoint states nothing")
    head: Literal["dense", "sparse"] | None = arg(
        None, help="sparse: a masked language model that states no head"
    )
    exclude_special_tokens: bool = arg(
        False, help="sparse, where the checkpoint states nothing: no maximum over [CLS] and [SEP]"
    )
    title: Literal["none", "space", "sep"] | None = arg(None, help="how titles are joined to texts")
    query_prompt: str = arg(None, help="text put before every query")
    passage_prompt: str = arg(None, help="text put before every passage")
    max_length: int = arg(None, least=3, help="tokens of a text of this --kind, or of each chunk")
    max_chunks: int = arg(
        None,
        least=1,
        help="maximum number of chunks per passage, each with its own vector (MaxP 4)",
    )
    max_characters: int = arg(
        None, least=0, help="cut passages to N characters first (ANCE 10000); 0 = do not"
    )
    override: bool = arg(
        False, help="take the flags of this group even where the checkpoint states otherwise"
    )
    trust_remote_code: bool = arg(False, help="run Python code that the checkpoint brings along")
    tokens_per_batch: int = arg(
        0,
        group="runtime",
        least=0,
        help="texts x longest of a batch; 0 = 2048 on a CPU (it fits the cache), 65536 on a GPU",
    )
    window: int = arg(8192, least=1, help="number of texts that are ordered by length at a time")
    shard_rows: int = arg(16384, least=1, help="texts per shard, the unit of work and resumption")
    num_workers: int = arg(2, least=0, help="loader processes that turn text into ids; 0 = none")
    dry_run: bool = arg(False, help="show the first inputs, truncation, batches and disk, and stop")


class Windows(Dataset):
    """Span [start, stop) of n texts, m chunks (one for each text, unless passages are cut) -> (the
    id of each chunk's text, (n,) bool: full, so the text may go on, all tokens in one (T,) int32
    array, (m,) lengths): arrays, because lists of lists would cost the main process more to receive
    than to make."""

    def __init__(self, texts, spans: list[tuple[int, int]], kind: str, form: TextFormat, tokenizer):
        self.texts, self.spans, self.kind, self.form, self.tokenizer = (
            texts,
            spans,
            kind,
            form,
            tokenizer,
        )

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, index):
        ids, titles, bodies = zip(*self.texts.stream(*self.spans[index]), strict=True)
        strings = format_texts(
            list(zip(titles, bodies, strict=True)), self.kind, self.form, self.tokenizer
        )
        longest, most = self.form.max_length(self.kind), self.form.chunks(self.kind)
        chunks = chunk_ids(strings, self.tokenizer, longest, most)
        full = np.array([len(some) == most and len(some[-1]) == longest for some in chunks])
        ids, tokens = (
            [i for i, some in zip(ids, chunks, strict=True) for _ in some],
            list(chain.from_iterable(chunks)),
        )
        lengths = np.fromiter(map(len, tokens), np.int32, len(tokens))
        return ids, full, np.fromiter(chain.from_iterable(tokens), np.int32, lengths.sum()), lengths


def cut(start: int, stop: int, window: int) -> list[tuple[int, int]]:
    """Spans of at most `window` texts. The first is short: encoding begins while the others are
    being tokenised."""
    edges = [start, *range(min(start + max(window // 16, 1), stop), stop, window), stop]
    return list(zip(edges, edges[1:], strict=False))


def to_csr(reps: torch.Tensor, min_weight: float) -> csr_matrix:
    """(n, V) on any device -> CSR of the weights above `min_weight`. A NaN stays one."""
    row, term = (~(reps <= min_weight)).nonzero(as_tuple=True)
    starts = np.cumsum([0, *np.bincount(row.cpu().numpy(), minlength=len(reps))])
    return csr_matrix(
        (reps[row, term].cpu().numpy(), term.int().cpu().numpy(), starts), shape=reps.shape
    )


def prune(vectors: csr_matrix, max_terms: int) -> csr_matrix:
    """The `max_terms` highest weights of each row; of equal ones those of the lower terms."""
    row = np.repeat(np.arange(vectors.shape[0]), np.diff(vectors.indptr))
    order = np.lexsort((-vectors.data, row))  # by row, then weight; stable
    rank = np.arange(vectors.nnz) - vectors.indptr[row[order]]
    vectors.data[order[rank >= max_terms]] = 0
    vectors.eliminate_zeros()
    return vectors


def main():
    # ---- setup
    args = parse_args(Args)
    accelerator = make_accelerator()
    rank, W, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    if (
        args.num_workers
    ):  # they are the parallelism; threads of the tokenizer's own would only contend
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    budget = args.tokens_per_batch or (2048 if device.type == "cpu" else 65536)

    # ---- model and texts
    overrides = {
        "title": args.title,
        "query_prompt": args.query_prompt,
        "passage_prompt": args.passage_prompt,
    }
    overrides |= {"max_chunks": args.max_chunks, "max_characters": args.max_characters}
    overrides[f"max_{args.kind}_length"] = args.max_length
    with accelerator.main_process_first():
        folder = checkpoint_folder(args.model)
        texts = open_texts(args.input)
    model = load_encoder(
        folder,
        args.pooling,
        overrides,
        normalize=args.normalize,
        strict=not args.override,
        trust_remote_code=args.trust_remote_code,
        head=args.head,
        exclude_special_tokens=args.exclude_special_tokens,
    ).to(device)
    form, tokenizer, sparse = model.format, model.tokenizer, isinstance(model, SparseBiEncoder)
    M = form.chunks(args.kind)
    dtype = args.dtype or ("float32" if sparse else "float16")
    if not sparse and (args.max_terms or args.min_weight):
        raise UserError(f"{folder}: a dense checkpoint — leave --max_terms and --min_weight out")
    meta = {
        "model": args.model,
        "model_hash": model_hash(folder),
        "head": "sparse" if sparse else "dense",
        **({"max_terms": args.max_terms, "min_weight": args.min_weight} if sparse else {}),
        "kind": args.kind,
        "pooling": model.pooling,
        "normalized": model.normalized,
        "dim": model.dim,
        "title": form.title if args.kind == "passage" else None,
        "prompt": form.prompt(args.kind),
        "max_length": form.max_length(args.kind),
        **({"max_chunks": M} if M > 1 else {}),
        **(
            {"max_characters": form.max_characters}
            if args.kind == "passage" and form.max_characters
            else {}
        ),
        "input": args.input,
        "input_fingerprint": texts.fingerprint,
        "count": len(texts),
        "dtype": dtype,
        "precision": accelerator.mixed_precision.replace("no", "fp32"),
        "shard_rows": args.shard_rows,
        "window": args.window,
        "tokens_per_batch": budget,
    }
    shards = [
        (s, min(s + args.shard_rows, len(texts))) for s in range(0, len(texts), args.shard_rows)
    ]
    _, full, tokens, lengths = Windows(
        texts, [(0, min(1000, len(texts)))], args.kind, form, tokenizer
    )[0]
    first = tokenizer.decode(tokens[: lengths[0]])
    facts = {
        "model": f"{args.model}, {model.pooling} pooling, {model.dim} dimensions, "
        f"normalised: {model.normalized}",
        "texts": f"{len(texts)} of {args.input}",
        "prompt": repr(meta["prompt"]),
        "title": meta["title"],
        "max_length": meta["max_length"],
        "first input": first if len(first) < 300 else f"{first[:200]} ... {first[-80:]}",
        **({"chunks": f"{len(lengths) / len(full):.2f} per text, {M} at most"} if M > 1 else {}),
        "at max_length": f"{full.mean():.1%} of the first {len(full)} texts",
        "running on": describe(accelerator),
        "stored as": f"{dtype}, {len(shards)} shard(s) of {args.shard_rows} texts",
    }
    if args.dry_run:
        times = len(texts) / len(full)
        batches = len(token_batches(lengths, budget, meta["max_length"])) * times
        disk = f"{len(lengths) * times * model.dim * np.dtype(dtype).itemsize / 1e9:.2f} GB"
        disk = "8 bytes per weight" if sparse else disk
        echo(
            accelerator,
            "dry run",
            {**facts, "batches": f"about {math.ceil(batches)}", "disk": disk},
        )
        return

    # ---- the folder: new, complete, or left by a run that died with the same model, input and
    # settings
    ignore = "num_workers", "override", "dry_run"
    complete = claim_output(args, accelerator, last_file="meta.json", ignore=ignore)
    folder = Path(args.output_dir)
    progress = folder / ("meta.json" if complete else "progress.json")
    if accelerator.is_main_process and not progress.is_file():
        write_json(progress, meta)
    accelerator.wait_for_everyone()
    before = read_json(progress)
    for key, value in meta.items():
        if before.get(key) != value:
            raise UserError(
                f"{folder}: made with {key} {before.get(key)}, now {value} — remove the folder or "
                "choose another"
            )
    if complete:
        return
    echo(accelerator, "encoding", facts)

    # ---- encode
    missing = [s for s in range(len(shards)) if not (folder / shard_file(s, sparse)).is_file()]
    accelerator.wait_for_everyone()  # all have listed what is missing before the first adds to it
    mine = missing[rank::W]
    spans = [cut(*shards[s], args.window) for s in mine]
    windows = Windows(texts, list(chain(*spans)), args.kind, form, tokenizer)
    how = {"num_workers": args.num_workers, "worker_init_fn": end_with_parent}
    loader = iter(DataLoader(windows, batch_size=None, collate_fn=tuple, **how))
    total = sum(shards[s][1] - shards[s][0] for s in mine)
    bar = tqdm(total=total, unit=" texts", disable=not accelerator.is_main_process)
    packed = {"no": torch.float32, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    if device.type == "cpu" and packed:
        pack_linears(model.backbone.base_model, packed)
        speed_up_attention(model.backbone)
    limited, terms, clock = 0, 0, time.perf_counter()
    with (
        torch.inference_mode(),
        accelerator.autocast(),
    ):  # one context for all batches: weights are cast once
        for shard, parts in zip(mine, spans, strict=True):
            vectors, shard_ids = [], []
            for _ in parts:
                ids, full, tokens, lengths = next(loader)
                starts = np.cumsum(lengths) - lengths
                batches, encoded = token_batches(lengths, budget, meta["max_length"]), []
                for rows, width in batches:
                    batch = pad(
                        [tokens[starts[r] : starts[r] + lengths[r]] for r in rows], tokenizer, width
                    )
                    reps = model.encode(send_to_device(batch, device))
                    # a window of rows of V numbers would be a gigabyte
                    encoded.append(to_csr(reps, args.min_weight) if sparse else reps)
                order = np.argsort(np.concatenate([rows for rows, _ in batches]))
                window = (
                    vstack(encoded, "csr")[order]
                    if sparse
                    else torch.cat(encoded).cpu().numpy()[order]
                )
                values = window.data if sparse else window
                with np.errstate(over="ignore"):
                    stored = values.astype(dtype)
                if not np.isfinite(stored).all():
                    at = int(np.argmin(np.isfinite(stored)))
                    wrong = ids[
                        np.searchsorted(window.indptr, at, "right") - 1
                        if sparse
                        else at // model.dim
                    ]
                    finite = np.isfinite(values).all()
                    remedy = (
                        "add --dtype float32" if finite else "check the checkpoint, or use fp32"
                    )
                    raise UserError(f"{args.input}: the vector of {wrong} is not finite — {remedy}")
                if sparse:
                    stored = prune(window, args.max_terms) if args.max_terms else window
                    terms += stored.nnz
                vectors.append(stored)
                shard_ids += ids
                limited += int(full.sum())
                bar.update(len(full))
            vectors = vstack(vectors, "csr") if sparse else np.concatenate(vectors)
            if sparse:
                vectors.data = vectors.data.astype(
                    dtype
                )  # the last thing done to it: scipy knows no float16
            write_shard(folder, shard, vectors, shard_ids)
    seconds = time.perf_counter() - clock
    bar.close()

    # ---- done
    done = gather_object([(total, limited, terms, seconds)])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        texts_done, limited, terms = (sum(d[i] for d in done) for i in range(3))
        seconds = max(d[3] for d in done)
        if M > 1:
            meta["vectors"] = sum(
                len(np.load(path, mmap_mode="r")) for path in folder.glob("shard-*.npy")
            )
        finish_embeddings(folder, meta)
        (folder / "progress.json").unlink()
        print(
            f"{texts_done} texts in {seconds:.1f} s "
            f"({texts_done / max(seconds, 1e-9):.0f} texts/s), "
            f"{limited / max(texts_done, 1):.1%} of them at max_length"
            f"{f', {terms / max(texts_done, 1):.1f} terms each' if sparse else ''} -> {folder}"
        )


if __name__ == "__main__":
    run(main)
