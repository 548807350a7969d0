"""Tables of tuned choices: JSON files, one a GPU model, that any number of processes read and add to."""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from moe.base_config import Count, FrozenConfig
from moe.config import MoEConfig
from moe.gemm.config import ACTIVATIONS, GateUpOrder, named_activations
from moe.runtime.cache_folder import cache_folder, file_lock, make_folder, replace_file
from moe.tuning.choice import TuningChoice
from moe.tuning.gpu import KERNELS_VERSION, GpuModel, has_same_minor, torch_version, triton_version

FORMAT_VERSION: Final = 1
MAX_TABLE_BYTES = 1 << 24  # an entry is about 500 bytes: a thousand layers in all buckets
LOCK_TIMEOUT_S = 10.0
SHIPPED_TABLES = Path(__file__).parent / "tables"
_LOGGER = logging.getLogger("moe.tuning")

Report = Callable[[str], None]


class LayerKey(FrozenConfig):
    """Which layers share timings. How experts are chosen, and which slice of them lies here, has no part in them."""

    model_config = ConfigDict(strict=True)

    hidden_size: Count
    intermediate_size: Count
    num_experts: Count
    num_local_experts: Count
    top_k: Count
    activation: str
    layout: Literal["MajorK", "MajorMn", "BlockMajorK"]
    is_shuffled: bool
    gate_up_order: GateUpOrder
    gemm2_layout: Literal["MajorK", "MajorMn", "BlockMajorK"]
    gemm2_is_shuffled: bool
    dtype: Literal["bfloat16"] = "bfloat16"

    @field_validator("activation")
    @classmethod
    def _is_implemented(cls, name: str) -> str:
        if name not in {member.name for member in ACTIVATIONS["portable"]}:
            raise ValueError(f"expected {named_activations()}, got {name!r}")
        return name

    @classmethod
    def of(cls, config: MoEConfig) -> LayerKey:
        first, second = config.gemm1.weight_format, config.gemm2.weight_format
        assert config.gemm1.activation is not None  # MoEConfig refuses others
        return cls.model_validate(
            {
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_experts": config.num_experts,
                "num_local_experts": config.permute.num_local_experts,
                "top_k": config.top_k,
                "activation": config.gemm1.activation.name,
                "layout": first.layout.name,
                "is_shuffled": first.is_shuffled,
                "gate_up_order": first.gate_up_order,
                "gemm2_layout": second.layout.name,
                "gemm2_is_shuffled": second.is_shuffled,
            }
        )


class TableEntry(FrozenConfig):
    """The fastest choice for a layer in a bucket; one that names nothing says that the model's was not beaten."""

    model_config = ConfigDict(strict=True)

    key: LayerKey
    bucket: Count
    choice: TuningChoice
    tuned_us: float = Field(gt=0, allow_inf_nan=False)
    model_us: float = Field(gt=0, allow_inf_nan=False)  # of the model's choice, in the same measurement


class TuningTable(FrozenConfig):
    """Entries, and for what they hold. At most one entry a layer and bucket; in a file they are sorted."""

    model_config = ConfigDict(strict=True)

    format_version: Literal[1] = FORMAT_VERSION
    gpu: GpuModel
    torch: str
    triton: str
    kernels_version: int
    date: str | None = None  # of the last change, ISO 8601
    entries: tuple[TableEntry, ...] = ()

    @classmethod
    def create(cls, gpu: GpuModel, entries: Iterable[TableEntry] = ()) -> TuningTable:
        """A table of today, for the versions that are installed. Of two entries for a layer and bucket the later counts."""
        latest = {(entry.key, entry.bucket): entry for entry in entries}
        return cls(
            gpu=gpu,
            torch=torch_version(),
            triton=triton_version(),
            kernels_version=KERNELS_VERSION,
            date=datetime.date.today().isoformat(),
            entries=tuple(sorted(latest.values(), key=_order)),
        )

    def text(self) -> str:
        """JSON, an entry a line: what changed is a line of a diff."""
        head = self.model_dump(mode="json", exclude={"entries"}, exclude_none=True)
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        entries = (entry.model_dump(mode="json", exclude_none=True) for entry in sorted(self.entries, key=_order))
        rows = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        return "\n".join(["{", *lines, f'  "entries": [\n{rows}\n  ]' if rows else '  "entries": []', "}", ""])


Entries = Mapping[tuple[LayerKey, int], TableEntry]


class UnusableTable(ValueError):
    """A file that is no table of ours, or one whose timings do not hold here."""


class _Head(BaseModel):
    format_version: int = Field(strict=True)


def user_table_path(gpu: GpuModel) -> Path:
    """The table that tuning on this machine adds to, in the cache folder.

    Each version of the kernels and of triton has one of its own, as several environments may share the folder.
    """
    return cache_folder() / f"{gpu.slug()}-kernels{KERNELS_VERSION}-triton{_minor(triton_version())}.json"


def shipped_table_path(gpu: GpuModel, triton: str | None = None) -> Path:
    """The table that came with the package for a version of triton, by default the one here; most GPU models have none."""
    return SHIPPED_TABLES / f"{gpu.slug()}-triton{_minor(triton or triton_version())}.json"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def warn(line: str) -> None:
    warnings.warn(f"moe.tuning: {line}", stacklevel=2)


def load_table(path: Path, gpu: GpuModel, *, report: Report = warn) -> TuningTable | None:
    """The table in a file, or None where its timings cannot be used, whatever the reason.

    Args:
        report: is told why in a line; a file that is missing says nothing.
    """
    try:
        return _read(Path(path), gpu)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (UnusableTable, OSError) as error:
        report(f"{path} is not used: {_line_of(error)}")
        return None


def read_gpu(path: Path) -> GpuModel | None:
    """Which GPU model a table is for; None for what is no table."""
    try:
        return TuningTable.model_validate_json(path.read_bytes()).gpu
    except (OSError, ValidationError):
        return None


def merge_into(
    path: Path,
    gpu: GpuModel,
    entries: Iterable[TableEntry],
    *,
    seen: Entries | None = None,
    report: Report = warn,
) -> TuningTable:
    """Add entries to a file, over those that it holds for the same layer and bucket, and return the whole table.

    Args:
        seen: what the file held when the search for these entries began; an entry is left out where another process has
            written one since: of several that search at once, the first counts for all. None: these entries win.

    Safe with other processes that do the same, and against being killed: the file is always a whole table. One that is
    no table of ours, or whose timings do not hold any more, is renamed to end in .bak first. What cannot be written is
    reported in a line, and is in the returned table all the same.
    """
    entries = tuple(entries)
    path = Path(os.path.realpath(path))  # a link stays one
    try:
        make_folder(path.parent)
        with file_lock(f"{path}.lock", timeout=LOCK_TIMEOUT_S):
            table = _merged(gpu, _kept_entries(path, gpu, report), entries, seen)
            replace_file(path, table.text())
            return table
    except (OSError, NotImplementedError) as error:  # the latter from file systems without locks
        report(f"{path} cannot be written, so what was tuned is lost when this process ends: {_line_of(error)}")
    known = load_table(path, gpu, report=_LOGGER.debug)
    return _merged(gpu, known.entries if known else (), entries, seen)


def by_layer(entries: Iterable[TableEntry]) -> dict[tuple[LayerKey, int], TableEntry]:
    """Entries by layer and bucket."""
    return {(entry.key, entry.bucket): entry for entry in entries}


def _merged(
    gpu: GpuModel, known: Iterable[TableEntry], entries: Iterable[TableEntry], seen: Entries | None
) -> TuningTable:
    stands = by_layer(known)
    for place, entry in by_layer(entries).items():
        if seen is None or stands.get(place) == seen.get(place):
            stands[place] = entry
    return TuningTable.create(gpu, stands.values())


def export_into(path: Path, gpu: GpuModel, entries: Iterable[TableEntry]) -> TuningTable:
    """Add entries to a file that somebody keeps, and return the whole table. One process at a time.

    Raises:
        UnusableTable: the file is no table of ours, or its timings do not hold here; it is left as it is.
        OSError: the file cannot be read or written.
    """
    try:
        known = _read(Path(path), gpu).entries
    except FileNotFoundError:
        known = ()
    table = TuningTable.create(gpu, (*known, *entries))
    replace_file(Path(os.path.realpath(path)), table.text())
    return table


def _read(path: Path, gpu: GpuModel) -> TuningTable:
    """Raises OSError for what cannot be read, UnusableTable for content that cannot be used."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise IsADirectoryError(f"expected a file, got {'a directory' if stat.S_ISDIR(mode) else 'something else'}")
    with path.open("rb") as file:
        content = file.read(MAX_TABLE_BYTES + 1)
    if len(content) > MAX_TABLE_BYTES:
        raise UnusableTable(f"expected at most {MAX_TABLE_BYTES} bytes, got more")
    try:
        format_version = _Head.model_validate_json(content).format_version
        if format_version != FORMAT_VERSION:
            raise UnusableTable(f"expected format_version {FORMAT_VERSION}, got {format_version}")
        table = TuningTable.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UnusableTable(f"{where or 'content'}: {first['msg']}") from error
    _expect_to_hold(table, gpu)
    return table


def _expect_to_hold(table: TuningTable, gpu: GpuModel) -> None:
    if not table.gpu.shares_timings_with(gpu):
        raise UnusableTable(
            f"expected timings of {gpu.name} ({gpu.num_sms} SMs), got {table.gpu.name} ({table.gpu.num_sms})"
        )
    if table.kernels_version != KERNELS_VERSION:
        raise UnusableTable(
            f"expected timings of kernels_version {KERNELS_VERSION}, got {table.kernels_version}; tune anew"
        )
    if not has_same_minor(table.triton, triton_version()):
        raise UnusableTable(f"expected timings under triton {triton_version()}, got {table.triton}; tune anew")


def _kept_entries(path: Path, gpu: GpuModel, report: Report) -> tuple[TableEntry, ...]:
    """What the file holds; a file that cannot be used is moved out of the way."""
    try:
        return _read(path, gpu).entries
    except FileNotFoundError:
        return ()
    except UnusableTable as error:
        names = itertools.chain([".bak"], (f".bak{number}" for number in itertools.count(2)))
        aside = next(name for name in (Path(f"{path}{end}") for end in names) if not os.path.lexists(name))
        os.rename(path, aside)
        report(f"{path} was moved to {aside.name}: {_line_of(error)}")
        return ()


def _order(entry: TableEntry) -> tuple[object, ...]:
    return (*dict(entry.key).values(), entry.bucket)


def _line_of(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
