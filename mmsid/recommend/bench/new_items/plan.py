"""Jobs of the new-item benchmark. The folder name of a job contains the hash of its inputs, so a finished job is found again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmsid._version import __version__
from mmsid.artifacts import input_hashes, is_complete, plain, read_manifest, sha256
from mmsid.config import build
from mmsid.recommend.bench.config import DatasetConfig
from mmsid.recommend.bench.new_items.config import RETRAINED, NewItemsSuite, Protocol, SidsName
from mmsid.recommend.bench.new_items.methods import CLASSICAL
from mmsid.tokenizer.train_config import TrainTokenizerConfig

Kind = Literal["sids", "classical", "cosine", "sid_transformer", "liger", "hybrid", "peer"]
LIGER = ("liger", "liger_weighted")


@dataclass(frozen=True)
class Draw:
    """One draw of one protocol. `number` is also the seed of its tokenizers and recommenders."""

    protocol: Protocol
    number: int

    def __str__(self) -> str:
        return f"{self.protocol}-{self.number}"


@dataclass(frozen=True)
class NewItemJob:
    """One unit of work, which writes `folder`.

    Attributes:
        name: the SIDs (kind `sids`), else the method.
        made_from: inputs, hashed in the folder name and listed in the manifest.
        sids: folder of the Semantic IDs that the job reads.
        decoder: folder of the trained SID transformer that the job reads.
        methods: methods whose ranks the job writes.
    """

    kind: Kind
    draw: Draw
    name: str
    folder: Path
    made_from: dict[str, Any]
    sids: Path | None = None
    decoder: Path | None = None
    methods: tuple[str, ...] = ()

    @property
    def key(self) -> Path:
        """Identity of the job: its folder."""
        return self.folder

    @property
    def needs(self) -> tuple[Path, ...]:
        """Folders that must be complete before the job starts."""
        return tuple(path for path in (self.sids, self.decoder) if path is not None)

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {self.draw})"


@dataclass(frozen=True)
class NewItemPlan:
    """All jobs of the benchmark on one data set.

    Attributes:
        work: folder of the jobs.
        peers: names of the methods that the caller adds.
    """

    dataset: DatasetConfig
    suite: NewItemsSuite
    catalog_sha256: str
    work: Path
    peers: tuple[str, ...] = ()
    _annotations: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        folders = {"captions": self.dataset.captions, "interests": self.dataset.interests}
        object.__setattr__(self, "_annotations", input_hashes(folders))

    def draws(self, protocol: Protocol) -> list[Draw]:
        """The draws of a protocol."""
        return [Draw(protocol, number) for number in range(self.suite.draws if protocol == "hidden" else 1)]

    def methods(self, protocol: Protocol) -> list[str]:
        """Methods of a protocol. After a point in time, new items have no interactions to retrain with."""
        chosen = [method for method in self.suite.methods if protocol == "hidden" or method not in RETRAINED]
        return [*chosen, *self.peers]

    def jobs(self, draw: Draw, methods: Iterable[str]) -> list[NewItemJob]:
        """The jobs of some methods and of all that they need, each after its needs."""
        found: dict[Path, NewItemJob] = {}
        for method in methods:
            job = self.job(draw, method)
            needed = [] if job.sids is None else [self.sids(draw, _sids_of(method))]
            needed += [] if job.decoder is None else [self.job(draw, "sid_transformer/ours")]
            found |= {one.folder: one for one in (*needed, job)}
        return sorted(found.values(), key=lambda job: job.kind != "sids")

    def job(self, draw: Draw, method: str) -> NewItemJob:
        """The job that writes the ranks of a method."""
        if method in self.peers:
            return self.peer(draw, method)
        if method in CLASSICAL:
            return self._job("classical", draw, "classical", {}, methods=tuple(CLASSICAL))
        if method == "minilm_cosine":
            return self._job("cosine", draw, method, self._texts(), methods=(method,))
        sids = self.sids(draw, _sids_of(method))
        from_sids: dict[str, Any] = {"sids": sids.made_from}
        if method == "emb_cosine":
            return self._job("cosine", draw, method, from_sids, sids=sids.folder, methods=(method,))
        settings = from_sids | {"model": plain(self.suite.model), "schedule": plain(self.suite.schedule)}
        if method in LIGER:
            decoder = self.job(draw, "sid_transformer/ours")
            return self._job("liger", draw, "liger", settings, sids=sids.folder, decoder=decoder.folder, methods=LIGER)
        kind = "hybrid" if "hybrid" in method else "sid_transformer"
        return self._job(kind, draw, method, settings, sids=sids.folder, methods=(method,))

    def finished_peers(self, draw: Draw) -> list[str]:
        """Methods that any call added and that are finished under these rules."""
        folders = [path for path in (self.work / str(draw) / "peer").glob("*") if is_complete(path)]
        names = [read_manifest(folder)["config"]["name"] for folder in folders]
        return sorted(name for name, folder in zip(names, folders, strict=True) if self.peer(draw, name).folder == folder)

    def peer(self, draw: Draw, name: str) -> NewItemJob:
        """The job of a method that the caller adds."""
        return self._job("peer", draw, name, self._texts(), methods=(name,))

    def sids(self, draw: Draw, name: SidsName) -> NewItemJob:
        """The job that makes Semantic IDs of known and new items."""
        made_from = self._texts() | {"num_levels": self.dataset.num_levels, "codebook_size": self.dataset.codebook_size}
        if name in ("ours", "retrained"):
            made_from |= {"tokenizer": plain(self.suite.tokenizer)}
        return self._job("sids", draw, name, made_from)

    def tokenizer(self, seed: int) -> TrainTokenizerConfig:
        """Settings of our tokenizer; the job sets `out` and `catalog`.

        Raises:
            ConfigError: an override that the stage train_tokenizer does not have.
        """
        given = self.dataset.model_dump(include={"captions", "interests", "use", "num_levels", "codebook_size"})
        given |= {"out": self.work, "catalog": self.dataset.catalog, "seed": seed}
        return build(TrainTokenizerConfig, given | self.suite.tokenizer, source="suite", section="tokenizer")

    def _texts(self) -> dict[str, Any]:
        return {"use": self.dataset.use, "annotations": self._annotations}

    def _job(self, kind: Kind, draw: Draw, name: str, made_from: dict[str, Any], **rest: Any) -> NewItemJob:
        world: dict[str, Any] = {"catalog": self.catalog_sha256, "split": plain(self.dataset.catalog.split), "version": __version__}
        world |= {"protocol": draw.protocol, "draw": draw.number, "kind": kind, "name": name}
        world |= {"share": self.suite.share} if draw.protocol == "hidden" else {"fit_until": self.suite.fit_until}
        folder = self.work / str(draw) / kind / f"{name.replace('/', '-')}-{sha256(world | made_from)[:12]}"
        return NewItemJob(kind, draw, name, folder, world | made_from, **rest)


def _sids_of(method: str) -> SidsName:
    if method in RETRAINED:
        return "retrained"
    return method.partition("/")[2] or "ours"  # type: ignore[return-value]
