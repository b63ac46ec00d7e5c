"""The second half of bench/gpu.py: how fast, how much memory, beside whom?

BERT-base from its config with random weights, on generated texts. The scripts run in this process,
their logs give tokens or queries per second and the share of the time that is spent waiting for
data. Peers take turns with us."""

import contextlib
import importlib.util
import io
import json
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.gpu_data import Collection, Writer, write_collection, write_model
from bench.gpu_scripts import call, forget_accelerator, log_of, without_rehearsal
from bench.gpu_sizes import MSMARCO, SHAPES, layers_flops, peaks_of, pretraining_flops, sizes_for
from bench.search_sparse import generated, generated_queries
from lib.embeddings import Embeddings, finish_embeddings, write_shard
from lib.inverted import open_sparse
from lib.search import DenseIndex

WINDOWS = 3  # log lines of a training run; the first is warm-up


@dataclass
class Timing:
    """One line of a table. What was not measured is None."""

    name: str
    speed: str
    used: float | None = None  # of the peak of the device
    memory: float | None = None  # GB
    waited: float | None = None  # share of the time


class Fast:
    """The timings. `folder` takes their files."""

    def __init__(self, folder: Path, device: str, tiny: bool):
        self.folder = folder
        self.device = device
        self.tiny = tiny
        self.cuda = device == "cuda"
        memory, name = 8.0, ""
        if self.cuda:
            properties = torch.cuda.get_device_properties(0)
            memory, name = properties.total_memory / 1e9, properties.name
        disk = shutil.disk_usage(folder).free / 1e9
        self.sizes = sizes_for(memory, disk, tiny)
        self.peak, self.bandwidth = peaks_of(name)
        old = self.cuda and torch.cuda.get_device_capability()[0] < 8
        self.precision = "fp16" if old else "bf16"
        self.workers = 0 if tiny else 4
        self.window = 1 if tiny else 5  # steps between two log lines
        self.number = 0
        sizes = self.sizes
        words = write_model(folder / "base", sizes.vocabulary, **sizes.model)
        texts = 2 * sizes.batch * self.window if tiny else 8192
        queries = max(4 * sizes.large, sizes.group)
        for name, tokens in (("blocks", sizes.length * 0.96), ("passages", sizes.passage * 1.2)):
            size = Collection(texts, queries, tokens=int(tokens), query_tokens=40)
            write_collection(folder / name, words, size)
        self.words = words

    def notes(self) -> list[str]:
        """What a reader of the table must know."""
        sizes = self.sizes
        peak = "unknown, so left blank"
        if self.peak:
            peak = f"{self.peak} TFLOPS in {self.precision}, {self.bandwidth} TB/s"
        found = [f"Training and encoding in {self.precision}. The peak of this device: {peak}."]
        found.append("Operations are those of the model: not what is recomputed, no embeddings.")
        if not self.tiny and sizes.share < 1:
            found.append(f"Memory is small here: batches are {sizes.share} of the usual ones.")
        if not self.tiny and sizes.searched < MSMARCO:
            found.append(f"Memory or disk is small here: {sizes.searched:,} vectors are searched.")
        return found

    def out(self) -> Path:
        """A new folder."""
        self.number += 1
        return self.folder / f"fast{self.number}"

    def used(self, flops: float) -> float | None:
        """The share of the device's peak, of operations per second."""
        return flops / (self.peak * 1e12) if self.peak else None

    def start(self) -> None:
        """Forget what the last measurement has left."""
        torch.compiler.reset()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> float | None:
        """The greatest memory on the device since `start`, in GB."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None

    def train(self, script: str, flags: dict, compiled: bool) -> tuple[dict, float | None]:
        """(the medians of a training run's log, without the first line; memory)"""
        flags = flags | {
            "log_every": self.window,
            "max_steps": self.window * WINDOWS,
            "warmup_steps": 0,
        }
        flags |= {"num_workers": self.workers}
        self.start()
        environment = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"} if compiled else {}
        # at toy sizes nothing is compiled: it would take a minute
        stance = "force_eager" if self.tiny else "default"
        with torch.compiler.set_stance(stance), without_rehearsal():
            call(script, flags, self.device, self.precision, **environment)
        log = log_of(flags["output_dir"])[1:]
        values = {name: statistics.median(line[name] for line in log) for name in log[0]}
        return values, self.memory()

    def pretraining(self, objective: str, compiled: bool = False) -> Timing:
        sizes, out = self.sizes, self.out()
        flags = {
            "model": self.folder / "base",
            "corpus": self.folder / "blocks" / "corpus.jsonl",
            "objective": objective,
            "max_length": sizes.length,
            "per_device_batch_size": sizes.batch,
            "output_dir": out,
        }
        if objective == "cocondenser":
            # two spans of a document
            flags |= {"per_device_batch_size": sizes.batch // 2, "span_tokens": sizes.length // 2}
        values, memory = self.train("pretrain_mae", flags, compiled)
        shutil.rmtree(out)
        speed = values["tokens/s"]
        used = self.used(speed * pretraining_flops(sizes, objective))
        name = f"pre-training, {objective}{', torch.compile' * compiled}"
        return Timing(name, f"{speed:,.0f} tokens/s", used, memory, values["waited"])

    def finetuning(self, name: str, large: bool = False, compiled: bool = False, **more) -> Timing:
        sizes, out = self.sizes, self.folder / f"tuned-{name}{compiled * '-compiled'}"
        shutil.rmtree(out, ignore_errors=True)
        queries = sizes.large if large else sizes.queries
        data = self.folder / "passages"
        flags = {
            "model": self.folder / "base",
            "corpus": data / "corpus.jsonl",
            "queries": data / "queries.jsonl",
            "train": data / "train.jsonl",
            "per_device_batch_size": queries,
            "passages_per_query": sizes.group,
            "max_query_length": 32,
            "max_passage_length": sizes.passage,
            "output_dir": out,
        }
        values, memory = self.train("finetune_biencoder", flags | more, compiled)
        speed = values["queries/s"]
        model = sizes.model
        forward = layers_flops(model, model["num_hidden_layers"], sizes.passage)
        sparse = more.get("head") == "sparse"
        D, V = model["hidden_size"], sizes.vocabulary
        forward = 3 * forward + sparse * 2 * D * V
        used = self.used(speed * forward * (sizes.group * sizes.passage + 32))
        label = f"fine-tuning, {name}, {queries} x {sizes.group}{', torch.compile' * compiled}"
        return Timing(label, f"{speed:,.1f} queries/s", used, memory, values["waited"])

    def encoding(self, model: Path, name: str) -> Timing:
        sizes = self.sizes
        texts = self.folder / "encoded.jsonl"
        if not texts.is_file():
            lines = enumerate(self.encoded())
            rows = (json.dumps({"_id": str(row), "text": text}) + "\n" for row, text in lines)
            texts.write_text("".join(rows))
        flags = {"model": model, "input": texts, "kind": "passage", "num_workers": self.workers}
        flags |= {"output_dir": self.out(), "override": True, "max_length": sizes.passage}
        self.start()
        printed = call("encode", flags, self.device, self.precision)
        speed = float(re.search(r"\((\d+) texts/s\)", printed)[1])
        forward = layers_flops(sizes.model, sizes.model["num_hidden_layers"], sizes.passage)
        used = self.used(speed * sizes.passage * forward) if name == "dense" else None
        label = f"encoding, {name}, {sizes.encoded:,} passages"
        return Timing(label, f"{speed:,.0f} passages/s", used, self.memory())

    def encoded(self) -> list[str]:
        """The texts that are encoded, all a little too long."""
        writer = Writer(self.words, seed=2)
        return [writer.text(round(self.sizes.passage * 1.2)) for _ in range(self.sizes.encoded)]

    # ---- peers

    def peer_finetuning(self, model: Path) -> Timing:
        """sentence-transformers' trainer on the same texts, with the same batch."""
        import sentence_transformers as st
        from datasets import Dataset
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        from transformers import TrainerCallback

        sizes, window, moments = self.sizes, self.window, []

        class Clock(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step % window == 0:
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    moments.append(time.perf_counter())

        steps = self.window * WINDOWS
        columns = self.columns(steps * sizes.queries)
        encoder = st.SentenceTransformer(str(model), device=self.device)
        encoder.max_seq_length = sizes.passage
        settings = st.SentenceTransformerTrainingArguments(
            output_dir=str(self.out()),
            max_steps=steps,
            per_device_train_batch_size=sizes.queries,
            optim="adamw_torch_fused",
            bf16=self.precision == "bf16",
            fp16=self.precision == "fp16",
            use_cpu=not self.cuda,
            dataloader_num_workers=self.workers,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        loss = MultipleNegativesRankingLoss(encoder, scale=20.0)
        data = Dataset.from_dict(columns)
        self.start()
        trainer = st.SentenceTransformerTrainer(
            encoder, settings, train_dataset=data, loss=loss, callbacks=[Clock()]
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it says how long it took
            trainer.train()
        forget_accelerator()
        seconds = statistics.median(np.diff(moments)) / window
        label = f"the same, sentence-transformers {st.__version__}"
        return Timing(label, f"{sizes.queries / seconds:,.1f} queries/s", None, self.memory())

    def columns(self, rows: int) -> dict[str, list[str]]:
        """Texts of so many groups: a query, its positive, its negatives."""
        writer, sizes = Writer(self.words, seed=1), self.sizes
        columns = {"query": [writer.text(28) for _ in range(rows)]}
        for number in range(sizes.group):
            columns[f"passage{number}"] = [writer.text(sizes.passage) for _ in range(rows)]
        return columns

    def peer_encoding(self, model: Path) -> Timing:
        """SentenceTransformer.encode with its weights in the same precision, its faster way."""
        import sentence_transformers as st

        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        kwargs = {"dtype": dtype if self.cuda else torch.float32}
        encoder = st.SentenceTransformer(str(model), device=self.device, model_kwargs=kwargs)
        encoder.max_seq_length = self.sizes.passage
        texts = self.encoded()
        encoder.encode(texts[:256], batch_size=256)
        self.start()
        began = time.perf_counter()
        encoder.encode(texts, batch_size=256)
        speed = len(texts) / (time.perf_counter() - began)
        label = f"the same, sentence-transformers {st.__version__}"
        return Timing(label, f"{speed:,.0f} passages/s", None, self.memory())

    # ---- search

    def write_vectors(self, folder: Path) -> None:
        """Random unit vectors in float16."""
        sizes = self.sizes
        generator = torch.Generator(self.device).manual_seed(0)
        for shard, start in enumerate(range(0, sizes.searched, 1 << 18)):
            rows = min(1 << 18, sizes.searched - start)
            shape = (rows, sizes.dimension)
            block = torch.randn(*shape, generator=generator, device=self.device)
            block = torch.nn.functional.normalize(block).half().cpu().numpy()
            write_shard(folder, shard, block, [str(start + row) for row in range(rows)])
        finish_embeddings(folder, {"count": sizes.searched, "dim": sizes.dimension})

    def searching(self, turns: int) -> Iterator[Timing]:
        """Exact search of vectors on disk; the same by faiss, which has them in memory."""
        sizes, folder = self.sizes, self.folder / "vectors"
        self.write_vectors(folder)
        corpus = Embeddings(folder)
        generator = torch.Generator().manual_seed(1)
        queries = torch.randn(sizes.asked, sizes.dimension, generator=generator).numpy()
        searchers = {"exact search, ours": DenseIndex(corpus, self.device).search}
        if importlib.util.find_spec("faiss"):
            searchers["exact search, faiss"] = self.faiss(corpus)
        for _ in range(turns):
            for name, search in searchers.items():
                if search is None:
                    continue
                search(queries[:8], sizes.depth)
                self.start()
                began = time.perf_counter()
                search(queries, sizes.depth)
                seconds = time.perf_counter() - began
                size = sizes.searched * sizes.dimension * 2
                used = size / seconds / (self.bandwidth * 1e12) if self.bandwidth else None
                label = f"{name}, {sizes.asked:,} in {sizes.searched:,} x {sizes.dimension}"
                speed = f"{sizes.asked / seconds:,.0f} queries/s"
                yield Timing(f"{label}, top {sizes.depth}", speed, used, self.memory())
        shutil.rmtree(folder)

    def faiss(self, corpus: Embeddings) -> Callable | None:
        """Its search of all vectors, in float16 on a GPU; None if this faiss has none for it."""
        import faiss

        if not self.cuda:
            index = faiss.IndexFlatIP(corpus.dim)
        elif not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
            return None
        else:
            config = faiss.GpuIndexFlatConfig()
            config.useFloat16 = True
            index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), corpus.dim, config)
        for _, block in corpus.blocks(0, len(corpus), 1 << 16):
            index.add(np.ascontiguousarray(block, dtype=np.float32))
        return index.search

    def sparse_searching(self) -> Timing:
        """Exact search of sparse vectors, which runs on the CPU everywhere."""
        sizes, folder = self.sizes, self.folder / "sparse"
        draw = np.random.default_rng(0)
        block = generated(draw, sizes.sparse)
        write_shard(folder, 0, block, [str(row) for row in range(sizes.sparse)])
        facts = {"count": sizes.sparse, "dim": block.shape[1], "head": "sparse"}
        finish_embeddings(folder, facts)
        index = open_sparse(Embeddings(folder), self.folder / "inverted")
        queries = generated_queries(draw, 256)
        index.search(queries[:2], sizes.depth)
        index.search(queries, sizes.depth)  # brings the pages of the index into memory
        began = time.perf_counter()
        index.search(queries, sizes.depth)
        speed = 256 / (time.perf_counter() - began)
        label = f"exact sparse search on the CPU, {sizes.sparse:,} passages, top {sizes.depth}"
        return Timing(label, f"{speed:,.0f} queries/s")

    # ---- all

    def tasks(self) -> Iterator[tuple[str, Callable[[], list[Timing]]]]:
        """(name, function that measures), the most wanted first."""
        peer = importlib.util.find_spec("sentence_transformers") is not None
        dense, sparse = self.folder / "tuned-dense", self.folder / "tuned-sparse"
        unit = {"pooling": "cls", "normalize": True}
        turns = 1 if self.tiny else 2
        for objective in SHAPES:
            yield objective, lambda name=objective: [self.pretraining(name)]
        for _ in range(turns):
            yield "fine-tuning", lambda: [self.finetuning("dense", **unit)]
            if peer:
                yield "its peer", lambda: [self.peer_finetuning(dense)]
        chunks = unit | {"chunk_size": self.sizes.large}
        large = partial(self.finetuning, "dense with GradCache", large=True, **chunks)
        yield "GradCache", lambda: [large()]
        yield "sparse fine-tuning", lambda: [self.finetuning("sparse", head="sparse")]
        for _ in range(turns):
            yield "encoding", lambda: [self.encoding(dense, "dense")]
            if peer:
                yield "its peer", lambda: [self.peer_encoding(dense)]
        yield "sparse encoding", lambda: [self.encoding(sparse, "sparse")]
        yield "exact search", lambda: list(self.searching(turns))
        yield "sparse search", lambda: [self.sparse_searching()]
        compiled = partial(self.finetuning, compiled=True)
        yield "dense, torch.compile", lambda: [compiled("dense", **unit)]
        yield "sparse, torch.compile", lambda: [compiled("sparse", head="sparse")]
        for name in ("retromae",) if self.tiny else SHAPES:
            yield f"{name}, torch.compile", lambda name=name: [self.pretraining(name, True)]

    def timings(self, deadline: float) -> Iterator[Timing]:
        """All of them, as they are done; one that fails says why. After the deadline (of
        time.monotonic) the rest is named and left out."""
        for name, measure in self.tasks():
            if time.monotonic() > deadline:
                yield Timing(name, "left out: no time")
                continue
            try:
                yield from measure()
            except Exception as error:
                last = str(error).strip().rpartition("\n")[2].replace("|", "/")
                yield Timing(name, f"failed: {type(error).__name__}: {last}")
