"""Clips that are like a clip, a file or words: an index over a model's embeddings, asked exactly or approximately.

    vmm index runs/demo/published data/mine/manifest.jsonl runs/index
    vmm similar runs/index --clip a1

An index is a folder: vectors.safetensors (float32 [n E], unit), graph.usearch (an HNSW graph over them, Malkov and
Yashunin 2018, by the library usearch), items.jsonl (id, path, caption), index.json (model, manifest and its hash).
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.numpy import load_file
from usearch.index import Index

import vmm
from vmm.build import write_text
from vmm.data.account import Account
from vmm.data.inspection.dataset import printable
from vmm.data.loader import evaluation_batches
from vmm.data.manifest import manifest_digest, read_manifest
from vmm.data.samples import EvaluationViews
from vmm.errors import StorageError, UserError, one_of
from vmm.foreign import parse_json
from vmm.progress import progress
from vmm.told import follow, is_own, note_own
from vmm.told import tell as tell_source
from vmm.weights.tensors import save_arrays

FORMAT = 1
_GRAPH = "graph.usearch"
_SAMPLE = 200  # clips of which the graph's answers are compared with the exact ones


class Found(NamedTuple):
    """What an index answers, the nearest first. places: int [q k] in its items; likeness: cosine, float32 [q k]."""

    places: np.ndarray
    likeness: np.ndarray


class Similar:
    """An index that was read. vectors: float32 [n E], unit. items: {"id", "path", "caption"} of each. about: index.json."""

    def __init__(self, folder: str | Path):
        """Raises UserError: no index in the folder, or not whole."""
        self.folder = Path(folder)
        try:
            self.about = parse_json((self.folder / "index.json").read_text(encoding="utf-8-sig"))
            # Not splitlines(): a caption may hold U+2028.
            self.items = [
                parse_json(line) for line in (self.folder / "items.jsonl").read_text("utf-8").split("\n") if line
            ]
            self.vectors = load_file(self.folder / "vectors.safetensors")["vectors"]
        except Exception as error:  # four readers, of which each has errors of its own
            line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(f"index {folder}: not whole ({line}); write it with `vmm index`") from None
        if self.about.get("format") != FORMAT:
            raise UserError(f"index {folder}: format {self.about.get('format')!r} is not known; write it again")
        if self.vectors.ndim != 2 or self.vectors.dtype != np.float32 or not np.isfinite(self.vectors).all():
            raise UserError(f"index {folder}: vectors.safetensors holds no finite float32 [n E]; write it again")
        if len(self.items) != len(self.vectors):
            raise UserError(f"index {folder}: its files are of different numbers of clips; write it again")
        if not all(isinstance(item, dict) and {"id", "path", "caption"} <= set(item) for item in self.items):
            raise UserError(f"index {folder}: a line of items.jsonl is no clip; write it again")
        self._graph = None
        self.places = {item["id"]: place for place, item in enumerate(self.items)}

    @property
    def graph(self) -> Index:
        """The graph over the vectors: made of them, and never read from the folder of somebody else.

        usearch reads a graph's file unchecked, beyond its end where it says so. So it is read only where this user wrote
        it: its digest is then in the user's cache, out of reach of who made the folder.
        """
        if self._graph is None:
            file = self.folder / _GRAPH
            if is_own(file):
                self._graph = Index.restore(str(file))
            else:
                self._graph = _graph_of(self.vectors)
        return self._graph

    def exact(self, queries: np.ndarray, count: int) -> Found:
        """Returns the `count` clips of the highest cosine with each of queries [q E], by comparing all; ties: the first ones."""
        likeness = _unit(queries) @ self.vectors.T
        order = np.argsort(-likeness, axis=1, kind="stable")[:, :count]
        return Found(order, np.take_along_axis(likeness, order, 1))

    def approximate(self, queries: np.ndarray, count: int) -> Found:
        """Returns about the same in time that grows with the logarithm of the clips."""
        # One query comes back without a first axis.
        found = self.graph.search(_unit(queries), min(count, len(self.items)), threads=1)
        shape = (len(queries), -1)
        return Found(np.reshape(found.keys, shape).astype(int), 1 - np.reshape(found.distances, shape))

    def of_clip(self, clip: str, count: int, exact: bool = False) -> Found:
        """Returns the clips that are like one of the index, without itself; raises UserError: there is no such clip."""
        if clip not in self.places:
            raise UserError(f"index {self.folder}: no clip {clip!r}; {one_of(clip, self.places)}")
        own = self.places[clip]
        search = self.exact if exact else self.approximate
        found = search(self.vectors[own : own + 1], count + 1)
        others = found.places[0] != own
        return Found(found.places[:, others][:, :count], found.likeness[:, others][:, :count])


def _graph_of(vectors: np.ndarray) -> Index:
    graph = Index(ndim=vectors.shape[1], metric="ip", dtype="f32")
    graph.add(np.arange(len(vectors)), vectors, threads=1)  # in one thread: the same graph each time
    return graph


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def embed_clips(
    model,
    manifest: str,
    streams: Sequence[str] = (),
    stride: float = 0.0,
    account: Account | None = None,
    tell: Callable[..., None] = lambda *_: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns unit vectors [n E] of a manifest's clips, and the rows [n] that they are of: those that have any of the streams.

    A clip's vector is the sum of its streams' unit embeddings (of a model with a contrastive objective).

    model: from vmm.load. streams: of the model's, all but text by default. stride: seconds between the windows of a long clip,
    whose vectors are summed; 0: its middle window alone. account: is told what becomes of the files. tell: called with
    (clips done, all clips).

    Raises:
      UserError: a stream that the model lacks, or streams whose embeddings cannot be summed.
    """
    known = model.experiment.modalities
    streams = tuple(streams) or tuple(name for name in known if name != "text")
    for name in streams:
        if name not in known:
            raise UserError(f"index: the model has no stream {name!r}; {one_of(name, known)}")
    data = dataclasses.replace(model.experiment.data, labels={}, tags={}, targets={}, text="{caption}")
    if "text" in known and not data.tokenizer:
        raise UserError("index: the model was published without a tokenizer.json; put its own beside config.json")
    embed = jax.jit(lambda params, inputs: model.recipe.apply({"params": params}, inputs, method="embed"))
    total, rows = [], []
    account = Account() if account is None else account
    batches = evaluation_batches(
        manifest, data, model.experiment.clip, batch=16, views=EvaluationViews(stride=stride), modalities=known,
        account=account,
    )  # fmt: skip
    for batch, row, _ in batches:
        tell(int(row[batch.valid].max(initial=-1)) + 1, len(account.rows))
        values = jax.device_get(embed(model.params, {name: batch.inputs[name] for name in streams}))
        widths = {value.shape[1] for value in values.values()}
        if len(widths) > 1:
            raise UserError(
                f"index: embeddings of {', '.join(streams)} have different widths {sorted(widths)}; give one"
            )
        there = {name: batch.present[name] & batch.valid for name in streams}
        total.append(sum(_unit(value) * there[name][:, None] for name, value in values.items()))
        rows.append(np.where(np.logical_or.reduce(list(there.values())), row, -1))
    rows, total = np.concatenate(rows), np.concatenate(total)
    of_clip = np.unique(rows[rows >= 0])
    summed = np.zeros((len(of_clip), total.shape[1]), np.float32)
    np.add.at(summed, np.searchsorted(of_clip, rows[rows >= 0]), total[rows >= 0])
    return _unit(summed), of_clip


def write_index(
    model: str, manifest: str, folder: str | Path, streams: Sequence[str] = (), stride: float = 0.0
) -> Path:
    """Writes the index of a manifest's clips, and prints how often the graph's ten nearest are the exact ones.

    model: what vmm.load takes. The rest: as embed_clips.

    Raises:
      UserError: as embed_clips, or no clip that has any of the streams.
    """
    folder, loaded = Path(folder), vmm.load(model)
    account = Account()
    with progress(f"embedding {manifest}") as tell:
        vectors, of_clip = embed_clips(loaded, manifest, streams, stride, account, tell)
    for told in account.lines():
        print(told)
    if not len(vectors):
        raise UserError(f"dataset {manifest}: no clip has any of the streams {', '.join(streams) or 'of the model'}")
    rows = read_manifest(manifest, bool(loaded.experiment.data.remote))
    items = [{"id": rows[i].id, "path": rows[i].path, "caption": (*rows[i].captions, "")[0]} for i in of_clip]
    about = {
        "format": FORMAT,
        "model": tell_source(model, folder),
        "manifest": tell_source(manifest, folder),
        "manifest_sha256": manifest_digest(manifest),
        "streams": list(streams) or [name for name in loaded.experiment.modalities if name != "text"],
        "clips": len(items),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_arrays({"vectors": vectors}, folder / "vectors.safetensors")
        _graph_of(vectors).save(str(folder / _GRAPH))
        note_own(folder / _GRAPH)  # without a home the graph is made anew each time
        write_text(folder / "items.jsonl", "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
        write_text(folder / "index.json", json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
    similar = Similar(folder)
    print(
        f"{folder}: {len(items)} clips, {vectors.shape[1]} numbers each; recall@10 of the graph {recall(similar):.3f}"
    )
    return folder


def recall(similar: Similar, count: int = 10) -> float:
    """Returns the share of the exact `count` nearest that the graph finds, over the first clips of the index."""
    queries = similar.vectors[:_SAMPLE]
    exact, near = similar.exact(queries, count).places, similar.approximate(queries, count).places
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(exact.tolist(), near.tolist())]))


def ask(
    folder: str | Path,
    clip: str = "",
    file: str = "",
    words: str = "",
    count: int = 10,
    exact: bool = False,
    model: str = "",
) -> Found:
    """Prints the clips that are like one of the index, a media file, or words (of which one is given), and returns them.

    model: that embedded the index, as vmm.load takes it; "": where the index says. The clips' paths are shown and never opened.

    Raises:
      UserError: no index, no such clip, or a model that cannot embed what is asked for.
    """
    similar = Similar(folder)
    if sum(map(bool, (clip, file, words))) != 1:
        raise UserError("similar: give one of --clip ID, --file PATH or --text WORDS")
    if clip:
        found = similar.of_clip(clip, count, exact)
    else:
        own = is_own(similar.folder / _GRAPH)
        source = model or follow(similar.about.get("model"), similar.folder, own, "--model")
        try:
            loaded = vmm.load(source)
        except UserError as error:
            raise error if model else UserError(f"{error}; or give the model of {folder} as --model") from None
        given = {"text": words} if words else {name: file for name in similar.about["streams"] if name != "text"}
        vectors, lacking = {}, []
        for name, value in given.items():
            try:
                vectors |= loaded.embed(**{name: value})
            except UserError as error:  # a file without sound is asked for by what is seen
                lacking.append(error)
        if not vectors:
            raise lacking[0]
        query = sum(_unit(value) for value in vectors.values())
        if query.shape[1] != similar.vectors.shape[1]:
            raise UserError(f"similar: {', '.join(given)} and the index are embedded in different widths; use --clip")
        found = (similar.exact if exact else similar.approximate)(query, count)
    table = Table(title=Text(printable(f"like {clip or file or repr(words)}")))
    for column in ("", "likeness", "clip", "caption", "path"):
        table.add_column(column, justify="right" if column in ("", "likeness") else "left")
    for number, (place, likeness) in enumerate(zip(found.places[0], found.likeness[0]), 1):
        item = similar.items[place]
        told = (Text(printable(item[key])) for key in ("id", "caption", "path"))  # a caption may look like markup
        table.add_row(str(number), f"{likeness:.3f}", *told)
    Console().print(table)
    return found
